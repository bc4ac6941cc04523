"""A number keeps its sources from the record into the sentence, and a sentence gives them back."""

import math
import operator
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations.evidence import compare, estimate, mean, replicates
from ablations.traced import Count, Prose, Traced, carry, mark, sources_of, tracing
from bench.record import Record

NUMBERS = st.floats(0.1, 100)
BINARY = (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod)


def record(value: float, arm: str = "a", seed: int = 0, metric: str = "loss_gap") -> Record:
    known = {"study": "s", "unit": "", "noise": "absolute", "machine": "m", "revision": "r", "profile": "full"}
    return Record(**known, arm=arm, seed=seed, metric=metric, value=value, n=1, time="t")  # type: ignore[arg-type]


@given(NUMBERS, NUMBERS, st.sampled_from(BINARY))
def test_arithmetic_has_the_value_of_floats_and_the_sources_of_both(
    a: float, b: float, operation: Callable[[float, float], float]
) -> None:
    for left, right, sources in (
        (Traced(a, ("x",)), Traced(b, ("y",)), {"x", "y"}),
        (Traced(a, ("x",)), b, {"x"}),
        (a, Traced(b, ("y",)), {"y"}),
    ):
        found = operation(left, right)
        assert found == operation(a, b)
        assert sources_of(found) == sources


def test_signs_powers_rounding_and_choice_keep_the_sources() -> None:
    x = Traced(-2.5, ("x",))
    for found, value in ((-x, 2.5), (abs(x), 2.5), (+x, -2.5), (x**2, 6.25), (2**x, 2**-2.5), (round(x, 1), -2.5)):
        assert (found, sources_of(found)) == (value, {"x"})
    assert (round(x), sources_of(round(x))) == (-2, {"x"})
    assert sources_of(min(x, Traced(1.0, ("y",)))) == {"x"}
    assert sources_of(math.exp(x)) == frozenset()
    assert type(Traced(1.0, ("x",)) < 2) is bool


@given(NUMBERS, st.sampled_from((".3f", "+.2e", ".0%", ",.1f", ">9.2f", "")))
def test_a_sentence_reads_as_with_plain_floats_and_knows_the_span_of_each_number(value: float, spec: str) -> None:
    prose = Prose.of(f"it is {Traced(value, ('x', 'y')):{spec}} of {Count(6, ('z',))}.")
    assert prose == f"it is {value:{spec}} of 6."
    number, count = prose.references
    assert prose[number.start : number.end] == format(value, spec)
    assert (number.sources, count.sources) == ({"x", "y"}, {"z"})


def test_a_percent_sign_behind_a_number_is_part_of_it() -> None:
    prose = Prose.of(f"{Traced(26.0, ('x',)):.2g}% of them")
    assert prose[prose.references[0].start : prose.references[0].end] == "26%"


def test_a_number_that_was_cut_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="was cut apart"):
        Prose.of(f"{Traced(1.5, ('x',)):.2f}"[:-1])


def test_an_estimate_knows_exactly_its_replicates() -> None:
    rows = [record(1.0 + seed, arm, seed) for arm in "ab" for seed in range(3)] + [record(9.0, "c")]
    ids = {arm: {row.id for row in rows if row.arm == arm} for arm in "abc"}
    with tracing(rows) as traced:
        found = estimate(traced, arm="a", metric="loss_gap")
        gap = compare(traced, arm="a", baseline="b", metric="loss_gap").map(math.exp)
    assert Prose.of(f"{found}").references[0].sources == ids["a"]
    for part in (gap.value, gap.low, gap.high, gap.n):
        assert sources_of(part) == ids["a"] | ids["b"]
    assert estimate(rows, arm="a", metric="loss_gap") == found
    assert "\ue000" not in f"{estimate(rows, arm='a', metric='loss_gap')}"


def test_a_mean_of_what_lost_its_trace_has_the_records_read_since_the_last() -> None:
    rows = [record(1.0 + seed, arm, seed) for arm in "ab" for seed in range(2)]
    with tracing(rows) as traced:
        for arm in "ab":
            read = replicates(traced, arm=arm, metric="loss_gap")
            found = mean([math.log(float(row.value or 0)) for row in read.values()])
            assert sources_of(found.value) == {row.id for row in rows if row.arm == arm}
        assert sources_of(mean([1.0, 2.0]).value) == {row.id for row in rows if row.arm == "b"}
    assert sources_of(mean([1.0, 2.0]).value) == frozenset()


def test_a_number_without_sources_stays_plain() -> None:
    assert type(carry(1.0, frozenset())) is float
    assert carry(None, frozenset("x")) is None
    assert mark("1", ()) == "1"
