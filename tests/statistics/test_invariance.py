"""What a statistic must not depend on: the order of samples, seeds and records, their names, the unit, which arm is
called the baseline, and records of other things.

Scaling by a power of two changes no digit of a float, so results must be equal to the bit; by any other factor, equal
but for rounding.
"""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.catalogue import load
from ablations.claims import Outcome, ledger
from ablations.evidence import Estimate, compare, decide, estimate, mean, sign_flip, summarise
from ablations.significance import detectable, equivalence, holm_adjusted, paired_t, sign_flip_interval
from ablations.verdicts import verdict
from bench.interval import of_median
from bench.record import Record, append
from bench.replicate import across_processes
from reports.diff import diff
from reports.frame import summary
from tests.statistics.draws import record

VALUES = st.integers(-(10**6), 10**6).map(lambda n: n / 1024)
POSITIVE = st.integers(1, 10**6).map(lambda n: n / 1024)
SOME = st.lists(VALUES, min_size=2, max_size=9)
TIMES = st.lists(POSITIVE, min_size=2, max_size=12)
FEW = st.lists(VALUES, min_size=2, max_size=7)
POWERS = st.integers(-60, 60).map(lambda k: 2.0**k)
FACTORS = st.floats(1e-9, 1e9)
CHANCE = st.randoms(use_true_random=False)
ROUNDING = 1e-9  # some hundred roundings of 2^-53, and a subtraction of neighbours


def shuffled(items: list[Any], chance: random.Random) -> list[Any]:
    return chance.sample(items, len(items))


def parts(found: Estimate) -> tuple[float | None, ...]:
    return found.value, found.low, found.high, found.n


def near(found: Estimate, value: float, low: float | None, high: float | None, scale: float) -> bool:
    wanted = pytest.approx((value, low, high), rel=ROUNDING, abs=ROUNDING * scale)
    return bool((found.value, found.low, found.high) == wanted)


@given(SOME, CHANCE)
def test_a_mean_does_not_depend_on_the_order_of_its_samples(values: list[float], chance: random.Random) -> None:
    assert parts(mean(shuffled(values, chance))) == parts(mean(values))


@given(TIMES, CHANCE)
def test_a_geometric_mean_and_a_median_do_not_either(times: list[float], chance: random.Random) -> None:
    mixed = shuffled(times, chance)
    assert parts(mean(mixed, geometric=True)) == parts(mean(times, geometric=True))
    assert of_median(mixed) == pytest.approx(of_median(times), rel=ROUNDING)


@given(SOME, POWERS)
def test_a_mean_in_another_unit_is_the_same_mean(values: list[float], unit: float) -> None:
    found = mean(values)
    assert found.low is not None
    assert found.high is not None
    scaled = mean([unit * value for value in values])
    assert parts(scaled) == (unit * found.value, unit * found.low, unit * found.high, found.n)


@given(SOME, FACTORS)
def test_a_mean_in_any_unit_is_the_same_but_for_rounding(values: list[float], unit: float) -> None:
    found = mean(values)
    assert found.low is not None
    assert found.high is not None
    size = max(map(abs, values)) * unit
    assert near(mean([unit * v for v in values]), unit * found.value, unit * found.low, unit * found.high, size)


@given(TIMES, POWERS, FACTORS)
def test_the_interval_of_a_median_follows_the_unit(times: list[float], power: float, factor: float) -> None:
    low, high = of_median(times) or (0.0, 0.0)
    for unit, rounding in ((power, 0.0 if len(times) >= 6 else ROUNDING), (factor, ROUNDING)):
        scaled = of_median([unit * time for time in times])
        assert scaled == pytest.approx((unit * low, unit * high), rel=rounding, abs=0)


@given(TIMES)
def test_a_median_lies_in_its_interval_and_its_inverse_in_the_mirrored_one(times: list[float]) -> None:
    low, high = of_median(times) or (0.0, 0.0)
    middle = sorted(times)[len(times) // 2]
    if len(times) % 2:
        assert low <= middle <= high
    assert low <= high
    mirrored = of_median([1 / time for time in times])
    assert mirrored == pytest.approx((1 / high, 1 / low), rel=ROUNDING) or len(times) % 2 == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_sample_that_is_no_positive_number_is_refused_wherever_it_stands(bad: float, at: int) -> None:
    for times in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]):
        with pytest.raises(ValueError, match=r"samples=.*must be positive finite numbers"):
            of_median([*times[:at], bad, *times[at:]])


def test_samples_so_far_apart_that_nothing_bounds_them_have_no_interval() -> None:
    assert of_median([1e-300, 1e300]) is None
    assert of_median([1e-300] * 3 + [1e300] * 3) == (1e-300, 1e300)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_outside_0_and_1_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match=rf"level={level}: must lie between 0 and 1"):
        of_median([1.0, 2.0], level=level)


def pairs(ours: list[float], theirs: list[float], **more: Any) -> list[Record]:
    return [
        record(value, arm=arm, seed=seed, **more)
        for arm, values in (("a", ours), ("b", theirs))
        for seed, value in enumerate(values)
    ]


PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=6).map(lambda both: tuple(zip(*both, strict=True)))


@given(PAIRS)
def test_swapping_the_arms_mirrors_the_difference_and_inverts_the_ratio(both: Any) -> None:
    rows = pairs(*both)
    there = compare(rows, arm="a", baseline="b", metric="loss_gap")
    back = compare(rows, arm="b", baseline="a", metric="loss_gap")
    assert there.low is not None
    assert there.high is not None
    assert parts(back) == (-there.value, -there.high, -there.low, there.n)
    there = compare(rows, arm="a", baseline="b", metric="loss_gap", ratio=True)
    back = compare(rows, arm="b", baseline="a", metric="loss_gap", ratio=True)
    assert there.low is not None
    assert there.high is not None
    if there.low > 0 and there.high < 1e300:
        assert (back.value, back.low, back.high) == pytest.approx(
            (1 / there.value, 1 / there.high, 1 / there.low), rel=1e-6
        )


@given(PAIRS, st.permutations(range(6)), CHANCE)
def test_seeds_may_be_named_otherwise_and_records_come_in_any_order(
    both: Any, names: list[int], chance: random.Random
) -> None:
    rows = pairs(*both)
    renamed = shuffled([replace(row, seed=100 + names[row.seed or 0]) for row in rows], chance)
    for ratio in (False, True):
        found = [compare(some, arm="a", baseline="b", metric="loss_gap", ratio=ratio) for some in (rows, renamed)]
        assert parts(found[0]) == parts(found[1])
    assert parts(estimate(renamed, arm="a", metric="loss_gap")) == parts(estimate(rows, arm="a", metric="loss_gap"))


def unrelated(value: float) -> list[Record]:
    """Records beside the point that is asked for: another arm, metric, place, and a failure there."""
    return [
        record(value, arm="c"),
        record(value, arm="a", metric="bits_per_byte_gap", unit="bit/byte"),
        record(None, arm="a", error="lost", n=0, seed=99),
        record(None, arm="b", error="lost", n=0, seed=0),
    ]


@given(PAIRS, VALUES, CHANCE)
def test_records_of_other_things_change_nothing(both: Any, value: float, chance: random.Random) -> None:
    rows = pairs(*both)
    more = shuffled(rows + unrelated(value), chance)
    arms = {"arm": "a", "baseline": "b", "metric": "loss_gap"}
    assert parts(compare(more, **arms)) == parts(compare(rows, **arms))
    elsewhere = [replace(row, axes={"length": 2}) for row in rows]
    here = [replace(row, axes={"length": 1}) for row in rows]
    assert parts(compare([*elsewhere, *here], **arms, length=1)) == parts(compare(rows, **arms))
    of_a = [table[(table["arm"] == "a") & (table["metric"] == "loss_gap")] for table in map(summary, (rows, more))]
    assert of_a[0][["value", "low", "high", "n"]].equals(of_a[1][["value", "low", "high", "n"]].set_axis(of_a[0].index))


@given(FEW, CHANCE, POWERS, FACTORS)
def test_p_of_the_sign_flip_test_depends_on_neither_order_nor_direction_nor_unit(
    values: list[float], chance: random.Random, power: float, factor: float
) -> None:
    p = sign_flip(values)
    for other in (
        shuffled(values, chance),
        [-value for value in values],
        [power * value for value in values],
        [factor * value for value in values],
    ):
        assert sign_flip(other) == pytest.approx(p, rel=ROUNDING)


@given(FEW, VALUES, FACTORS)
def test_the_sign_flip_interval_moves_with_its_data(values: list[float], shift: float, factor: float) -> None:
    found = sign_flip_interval(values, 0.75)
    if found is None:
        assert len(values) < 4
        return
    low, high = found
    size = (max(map(abs, values)) + abs(shift)) * ROUNDING
    moved = sign_flip_interval([value + shift for value in values], 0.75)
    assert moved == pytest.approx((low + shift, high + shift), abs=size)
    assert sign_flip_interval([-value for value in values], 0.75) == pytest.approx((-high, -low), abs=size)
    scaled = sign_flip_interval([factor * value for value in values], 0.75)
    assert scaled == pytest.approx((factor * low, factor * high), abs=size * factor)


@given(st.lists(VALUES, min_size=3, max_size=8, unique=True), FACTORS, CHANCE)
def test_t_tests_and_what_they_could_have_seen_follow_the_unit(
    values: list[float], factor: float, chance: random.Random
) -> None:
    scaled = [factor * value for value in shuffled(values, chance)]
    assert paired_t(scaled) == pytest.approx(paired_t(values), rel=1e-6)
    assert equivalence(scaled, 3 * factor) == pytest.approx(equivalence(values, 3), rel=1e-6, abs=1e-12)
    assert equivalence([-value for value in values], 3) == pytest.approx(equivalence(values, 3), rel=1e-6, abs=1e-12)
    assert detectable(scaled) == pytest.approx(factor * detectable(values), rel=1e-6)


@settings(max_examples=10)  # statsmodels collects garbage on each
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8), CHANCE)
def test_holm_does_not_depend_on_the_order_of_comparisons(p_values: dict[str, float], chance: random.Random) -> None:
    mixed = dict(shuffled(list(p_values.items()), chance))
    assert holm_adjusted(mixed) == pytest.approx(holm_adjusted(p_values))


@given(VALUES, POSITIVE, VALUES, POWERS)
def test_a_verdict_is_the_same_upside_down_and_in_another_unit(
    value: float, half: float, border: float, unit: float
) -> None:
    found = Estimate(value, value - half, value + half, 6)
    here = decide(found, "", at_least=border).outcome
    assert decide(found.map(lambda part: -part), "", at_most=-border).outcome is here
    assert decide(found.map(lambda part: unit * part), "", at_least=unit * border).outcome is here
    opposite = {Outcome.HOLDS: Outcome.FAILS, Outcome.FAILS: Outcome.HOLDS}
    if border not in (found.low, found.high):
        assert decide(found, "", at_most=border).outcome is opposite.get(here, here)


@given(TIMES, CHANCE)
def test_joining_processes_does_not_depend_on_which_came_first(times: list[float], chance: random.Random) -> None:
    runs = [[record(time, noise="absolute")] for time in times]
    joined = [across_processes(some)[0] for some in (runs, shuffled(runs, chance))]
    assert joined[0].value == joined[1].value
    assert joined[0].interval == pytest.approx(joined[1].interval, rel=ROUNDING)


@settings(max_examples=10)  # each digests the syntax tree of the study's rules
@given(st.randoms(use_true_random=False))
def test_a_claim_is_decided_alike_in_any_order_of_records_and_whatever_else_was_measured(chance: random.Random) -> None:
    coin = load(str(Path(__file__).parents[1] / "ablations" / "coin_study.py"))
    rows = [
        record(
            0.5 - 0.3 * (arm == "bent") + 0.01 * chance.random(),
            study=coin.name,
            arm=arm,
            seed=seed,
            metric="loss",
            noise="absolute",
            rule=coin.rule_digest(),
            axes={"tosses": 1000},
        )
        for seed in range(6)
        for arm in ("fair", "bent")
    ]
    others = [replace(row, study="another", machine="another") for row in rows]
    found = [verdict(ledger()["A3"], {coin.name: coin}, some) for some in (rows, shuffled(rows + others, chance))]
    assert found[0].outcome is Outcome.HOLDS
    assert (found[0].outcome, found[0].value, found[0].low) == (found[1].outcome, found[1].value, found[1].low)


def test_a_diff_read_backwards_says_the_same(tmp_path: Path) -> None:
    before = [*pairs([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]), record(1.0, arm="old")]
    after = [*pairs([5.0, 5.1, 5.2], [2.0, 2.1, 2.2]), record(1.0, arm="young")]
    for name, rows in (("before", before), ("after", after)):
        append(tmp_path / name / "records.jsonl", rows)
    there, back = (
        {point.arm: point.verdict for point in diff(tmp_path / one, tmp_path / other).points}
        for one, other in (("before", "after"), ("after", "before"))
    )
    assert there == {"a": "changed", "b": "same", "old": "gone", "young": "new"}
    assert back == {"a": "changed", "b": "same", "old": "new", "young": "gone"}


def test_one_seed_has_a_mean_and_no_interval_in_any_unit() -> None:
    assert parts(summarise([record(2.0)])) == (2.0, None, None, 1)
    assert parts(summarise([record(2.0 * 2**40)])) == (2.0 * 2**40, None, None, 1)
