import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ablations.claims import Outcome
from ablations.evidence import (
    Estimate,
    NoEvidence,
    compare,
    decide,
    estimate,
    exponent,
    mean,
    seeds_needed,
    sign_flip,
    summarise,
)
from bench.record import Record

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


def record(value: float, *, arm: str = "a", seed: int | None = 0, noise: str = "absolute", **more: object) -> Record:
    known = {"study": "s", "metric": "loss", "unit": "nat/token", "machine": "m", "revision": "r", "profile": "full"}
    return Record(**known, arm=arm, seed=seed, noise=noise, value=value, time="t", **{"n": 1, **more})  # type: ignore[arg-type]


def test_the_interval_of_three_replicates_is_students() -> None:
    found = mean([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t of 2 degrees at 97.5%, standard deviation 1
    assert found.value == 2.0
    assert found.low == pytest.approx(2 - half, rel=1e-6)
    assert found.high == pytest.approx(2 + half, rel=1e-6)
    assert found.n == 3


@given(st.lists(NUMBERS, min_size=2, max_size=8, unique=True))
def test_the_interval_is_scipys(values: list[float]) -> None:
    ours, theirs = mean(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    scale = max(map(abs, values)) + 1
    assert ours.low == pytest.approx(theirs.low, abs=1e-6 * scale)
    assert ours.high == pytest.approx(theirs.high, abs=1e-6 * scale)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8))
def test_a_paired_ratio_and_its_inverse_mirror_each_other(ratios: list[float]) -> None:
    there, back = mean(ratios, geometric=True), mean([1 / ratio for ratio in ratios], geometric=True)
    assert there.value * back.value == pytest.approx(1)
    assert there.low is not None
    assert back.high is not None
    assert there.low * back.high == pytest.approx(1)


def test_the_interval_of_what_cannot_be_negative_stops_at_zero() -> None:
    rows = [record(0.0, seed=0), record(0.1, seed=1)]
    loss, gap = summarise(rows), summarise([replace(row, metric="loss_gap") for row in rows])
    assert loss.low == 0.0
    assert gap.low is not None
    assert gap.low < 0.0
    assert (loss.value, loss.high) == (gap.value, gap.high)


def test_the_interval_of_a_share_stops_at_the_whole_where_the_metric_does() -> None:
    rows = [record(1.0, seed=0), record(0.9, seed=1)]
    part, idle = (summarise([replace(row, metric=name) for row in rows]) for name in ("accuracy", "bubble_to_ideal"))
    assert part.high == 1.0
    assert idle.high is not None
    assert idle.high > 1.0
    assert (part.value, part.low) == (idle.value, idle.low)


def test_the_interval_covers_the_truth_in_about_95_of_100_studies() -> None:
    chance = random.Random(7)
    trials = [mean([chance.gauss(0, 1) for _ in range(6)]) for _ in range(2000)]
    covered = sum(found.low <= 0 <= found.high for found in trials) / len(trials)  # type: ignore[operator]
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_one_noisy_replicate_has_the_interval_of_its_record_and_counts_once() -> None:
    found = summarise([record(2.0, n=7, interval=(1.5, 2.5))])
    assert found == Estimate(2.0, 1.5, 2.5, 1)
    assert summarise([record(2.0)]) == Estimate(2.0, None, None, 1)


def test_an_exact_metric_that_is_equal_in_all_replicates_has_no_width() -> None:
    assert summarise([record(5, noise="exact", seed=seed) for seed in range(3)]) == Estimate(5.0, 5.0, 5.0, 3)


def test_an_exact_metric_that_differs_between_seeds_has_an_interval() -> None:
    found = summarise([record(value, noise="exact", seed=seed) for seed, value in enumerate((4, 5, 6))])
    assert found.low is not None
    assert found.low < 5 < found.high  # type: ignore[operator]


def test_an_estimate_of_several_points_asks_which() -> None:
    rows = [record(1.0, axes={"length": 1}), record(2.0, axes={"length": 2})]
    with pytest.raises(ValueError, match=r"several points are left; also say length"):
        estimate(rows, arm="a", metric="loss")
    assert estimate(rows, arm="a", metric="loss", length=2).value == 2.0


def test_an_estimate_without_records_says_what_is_missing() -> None:
    with pytest.raises(NoEvidence, match="no record of loss of b, length=3"):
        estimate([record(1.0)], arm="b", metric="loss", length=3)


def test_a_comparison_pairs_seeds_and_drops_those_with_one_side() -> None:
    ours = [record(value, arm="b", seed=seed) for seed, value in enumerate((2.0, 4.0, 6.0))]
    theirs = [record(value, arm="a", seed=seed) for seed, value in enumerate((1.0, 3.0))]
    assert compare([*ours, *theirs], arm="b", baseline="a", metric="loss").value == 1.0
    assert compare([*ours, *theirs], arm="b", baseline="a", metric="loss").n == 2
    ratio = compare([*ours, *theirs], arm="b", baseline="a", metric="loss", ratio=True)
    assert ratio.value == pytest.approx(math.sqrt(2 * 4 / 3))
    with pytest.raises(NoEvidence, match="no seed has loss of both b and a"):
        compare([ours[2], *theirs], arm="b", baseline="a", metric="loss")


def test_records_of_unequal_texts_are_no_pair() -> None:
    ours = [record(3.0, arm="b", seed=seed, corpus="one") for seed in (0, 1)]
    theirs = [record(1.0, seed=0, corpus="one"), record(9.0, seed=1, corpus="another")]
    found = compare([*ours, *theirs], arm="b", baseline="a", metric="loss")
    assert (found.value, found.n) == (2.0, 1)
    with pytest.raises(NoEvidence, match="no seed has loss of both b and a, of one corpus"):
        compare([ours[1], theirs[1]], arm="b", baseline="a", metric="loss")


@pytest.mark.parametrize(
    "low, high, outcome",
    [
        (1.0, 2.0, Outcome.HOLDS),
        (0.5, 2.0, Outcome.UNDECIDABLE),
        (0.5, 0.9, Outcome.FAILS),
        (None, None, Outcome.UNDECIDABLE),
    ],
)
def test_an_estimate_holds_inside_the_region_fails_outside_and_decides_nothing_across(
    low: float | None, high: float | None, outcome: Outcome
) -> None:
    assert decide(Estimate(1.0, low, high, 6), "answer", at_least=1.0).outcome is outcome


def test_an_estimate_above_a_bound_from_above_fails() -> None:
    assert decide(Estimate(5, 4, 6, 6), "answer", at_most=3).outcome is Outcome.FAILS
    assert decide(Estimate(5, 4, 6, 6), "answer", at_least=3, at_most=7).outcome is Outcome.HOLDS


@given(NUMBERS, st.floats(0, 10), st.floats(-10, 10).filter(lambda factor: factor != 0))
def test_a_mapped_estimate_keeps_its_bounds_in_order(value: float, half: float, factor: float) -> None:
    found = Estimate(value, value - half, value + half, 3).map(lambda part: factor * part)
    assert found.low is not None
    assert found.low <= found.value <= found.high  # type: ignore[operator]


def test_six_pairs_of_one_sign_are_the_fewest_that_decide() -> None:
    assert sign_flip([1, 2, 3, 1, 2, 3]) == pytest.approx(2 / 2**6)
    assert sign_flip([1, 2, 3, 1, 2]) == pytest.approx(2 / 2**5)
    assert seeds_needed() == 6
    assert seeds_needed(10) == 9


def test_one_difference_has_no_sign_to_test() -> None:
    assert sign_flip([3.0]) == 1.0


@pytest.mark.parametrize("differences", [[], [1.0, math.nan], [math.inf] * 6])
def test_differences_that_are_no_finite_numbers_have_no_p(differences: list[float]) -> None:
    with pytest.raises(ValueError, match=r"differences=\[.*must be finite numbers"):
        sign_flip(differences)


def test_nothing_has_a_ratio_to_a_baseline_of_zero() -> None:
    rows = [record(1.0), record(0.0, arm="b")]
    with pytest.raises(NoEvidence, match="loss of b is 0"):
        compare(rows, arm="a", baseline="b", metric="loss", ratio=True)


def test_an_exact_count_is_written_out() -> None:
    assert [str(Estimate(value, value, value, 1)) for value in (2284.0, 17195.0, 0.125)] == ["2284", "17,195", "0.125"]


def test_an_exponent_is_the_slope_in_each_seed_that_has_every_point() -> None:
    powers = {0: 1.5, 1: 1.7, 2: 1.6}
    points = {
        n: {seed: record(3 * n**power, seed=seed) for seed, power in powers.items() if (n, seed) != (64, 2)}
        for n in (16, 64, 256)
    }
    found = exponent(points)
    assert found.value == pytest.approx(1.6)  # without the third, which lacks a point: of the first two
    assert found.n == 2
    with pytest.raises(NoEvidence, match="at two points: there are 1"):
        exponent({16: points[16]})
    with pytest.raises(NoEvidence):
        exponent({16: {0: record(1.0)}, 64: {1: record(1.0, seed=1)}})
