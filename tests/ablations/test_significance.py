"""Each test agrees with scipy and statsmodels, keeps its level where there is no effect, and covers as it says."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from ablations.evidence import sign_flip
from ablations.significance import (
    detectable,
    detectable_by_flips,
    equivalence,
    flips_decide,
    holm_adjusted,
    judge_family,
    paired_t,
    pairs_to_see,
    sign_flip_interval,
)

WHOLE = st.integers(-1000, 1000).map(float)
SIX = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)


def test_six_pairs_have_the_interval_of_their_extremes() -> None:
    assert sign_flip_interval(SIX) == (1.0, 7.0)  # 2/64 lie outside: only the least and the largest mean of a subset


def test_seven_pairs_have_an_interval_worked_by_hand() -> None:
    # floor(0.05 x 64) = 3: the third smallest mean of a subset of 0, 1, 2, 4, 8, 16, 32 is that of {1} or of {0, 2},
    # after 0 and (0 + 1) / 2; the third largest is that of {8, 32}, after 32 and (16 + 32) / 2
    assert sign_flip_interval([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]) == (1.0, 20.0)


def test_five_pairs_or_fewer_have_no_exact_interval() -> None:
    assert sign_flip_interval(SIX[:5]) is None
    assert sign_flip_interval(SIX[:1]) is None
    assert sign_flip_interval(SIX[:5], level=0.9) == (1.0, 5.0)


@settings(max_examples=25)
@given(st.lists(WHOLE, min_size=6, max_size=9))
def test_the_interval_is_where_scipys_test_lets_a_value_stand(differences: list[float]) -> None:
    low, high = sign_flip_interval(differences) or (math.nan, math.nan)
    step = 1e-3  # means of subsets of nine whole numbers are at least 1/72 apart
    for value, stands in (
        (low + step, low < high),
        (high - step, low < high),
        (low - step, False),
        (high + step, False),
    ):
        p = sign_flip([difference - value for difference in differences])
        assert (p > 0.05) is stands


@given(st.lists(WHOLE, min_size=6, max_size=8), st.floats(0.125, 8), st.randoms(use_true_random=False))
def test_the_interval_follows_units_and_signs_and_ignores_order(
    differences: list[float], scale: float, chance: "np.random.Generator"
) -> None:
    found = sign_flip_interval(differences)
    assert found is not None
    turned = [-scale * difference for difference in differences]
    chance.shuffle(turned)  # type: ignore[arg-type]
    assert sign_flip_interval(turned) == pytest.approx((-scale * found[1], -scale * found[0]))


def test_the_exact_interval_covers_at_least_as_it_says_without_normality() -> None:
    chance, inside, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        low, high = sign_flip_interval(3.0 + chance.standard_t(2, size=8)) or (math.nan, math.nan)
        inside += low <= 3.0 <= high
    # it is exact: floor(0.05 x 128) = 6 means outside on each side, 1 - 12/256; three standard errors of 600 trials
    assert abs(inside / trials - (1 - 12 / 256)) < 3 * math.sqrt(0.047 * 0.953 / trials)


@pytest.mark.parametrize("differences", [[], [1.0] * 21])
def test_no_pairs_or_too_many_are_refused(differences: list[float]) -> None:
    with pytest.raises(ValueError, match=f"n={len(differences)}: must be 1 to 20"):
        sign_flip_interval(differences)


@given(st.lists(WHOLE, min_size=2, max_size=10, unique=True), st.floats(1, 500))
def test_t_and_equivalence_are_scipys_and_statsmodels(differences: list[float], margin: float) -> None:
    values = np.array(differences)
    assert paired_t(differences) == stats.ttest_rel(values, np.zeros_like(values)).pvalue
    both = [
        stats.ttest_1samp(values, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(values, margin, alternative="less").pvalue,
    ]
    assert equivalence(differences, margin) == pytest.approx(max(both), abs=1e-12)
    assert equivalence(differences, margin) == pytest.approx(
        ttost_paired(values, np.zeros_like(values), -margin, margin)[0]
    )


def test_differences_without_spread_are_what_they_are() -> None:
    assert (paired_t([0.5] * 4), paired_t([0.0] * 4)) == (2 / 2**4, 1.0)
    assert [equivalence([0.5] * 4, margin) for margin in (1.0, 0.5, 0.1)] == [1 / 2**4, 1.0, 1.0]
    assert detectable([0.5] * 4) == 0.0


@pytest.mark.parametrize("margin", [0.0, -1.0])
def test_a_margin_that_is_not_positive_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match=r"margin=.*must be above 0"):
        equivalence([1.0, 2.0], margin)


def test_a_single_difference_is_refused_by_the_test_of_equivalence() -> None:
    with pytest.raises(ValueError, match=r"n=1: must be at least 2 paired differences"):
        equivalence([0.0], 1.0)


@pytest.mark.parametrize("n, alpha", [*product((6, 9, 12, 20), (0.05, 0.05 / 9))])
def test_the_detectable_difference_is_statsmodels(n: int, alpha: float) -> None:
    differences = [float(at) for at in range(n)]
    size = detectable(differences, alpha) / float(np.std(differences, ddof=1))
    assert size == pytest.approx(TTestPower().solve_power(nobs=n, alpha=alpha, power=0.8), rel=1e-4)


@pytest.mark.parametrize("size, alpha", [*product((0.3, 0.8, 2.0, 7.0), (0.05, 0.05 / 12))])
def test_the_pairs_that_show_an_effect_are_the_fewest_that_detect_it(size: float, alpha: float) -> None:
    differences = [float(at) for at in range(6)]
    spread = float(np.std(differences, ddof=1))
    n = pairs_to_see(size * spread, differences, alpha)
    likely = [detectable([float(at) for at in range(m)], alpha) / float(np.std(range(m), ddof=1)) for m in (n, n - 1)]
    assert likely[0] <= size < likely[1]
    assert pairs_to_see(size * spread, differences, alpha, power=0.9) >= n


def test_without_spread_two_pairs_show_any_effect_and_no_number_shows_none() -> None:
    assert pairs_to_see(0.1, [0.5] * 4) == 2
    with pytest.raises(ValueError, match=r"effect=0.0: must be above 0"):
        pairs_to_see(0.0, [1.0, 2.0])


@pytest.mark.parametrize("n, alpha", [*product((2, 3), (0.05, 0.05 / 9))])
def test_two_pairs_detect_four_times_in_five_too(n: int, alpha: float) -> None:
    size = detectable([float(at) for at in range(n)], alpha) / float(np.std(range(n), ddof=1))
    trials = np.random.default_rng(3).normal(size, 1.0, (4000, n))
    found = stats.ttest_1samp(trials, 0.0, axis=1).pvalue <= alpha
    assert abs(found.mean() - 0.8) < 3 * math.sqrt(0.16 / len(trials))


def test_the_detectable_difference_is_detected_in_four_of_five_simulated_studies() -> None:
    chance, n, trials = np.random.default_rng(1), 6, 2000
    size = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
    found = stats.ttest_1samp(chance.normal(size, 1.0, (trials, n)), 0.0, axis=1).pvalue <= 0.05
    assert detectable(list(range(n))) == pytest.approx(size * float(np.std(range(n), ddof=1)))
    assert abs(found.mean() - 0.8) < 3 * math.sqrt(0.16 / trials)


def test_six_pairs_are_found_when_all_signs_agree() -> None:
    """So the effect d in standard deviations is that with Phi(d)^6 = 0.8: beyond what the t test sees."""
    size = detectable_by_flips(list(range(6))) / float(np.std(range(6), ddof=1))
    assert float(stats.norm.cdf(size)) ** 6 == pytest.approx(0.8)
    assert size > 1.2 * TTestPower().solve_power(nobs=6, alpha=0.05, power=0.8)


def test_what_flips_see_is_found_in_four_of_five_studies_by_the_test_itself() -> None:
    """9 seeds, 3 arms: scipy's own p under alpha / 3. 300 studies, each signed in 512 ways."""
    alpha, trials = 0.05 / 3, 300
    size = detectable_by_flips(list(range(9)), alpha) / float(np.std(range(9), ddof=1))
    draws = np.random.default_rng(4).normal(size, 1.0, (trials, 9)).tolist()
    found = sum(sign_flip(draw) <= alpha for draw in draws) / trials
    assert abs(found - 0.8) < 3 * math.sqrt(0.16 / trials)


def test_too_few_pairs_see_nothing_however_large_and_many_see_what_t_does() -> None:
    assert detectable_by_flips(SIX, 0.05 / 3) == math.inf
    many = list(range(15))
    assert detectable_by_flips(many, 0.01) == detectable(many, 0.01)
    last = list(range(14))  # that is simulated
    assert detectable_by_flips(last, 0.01) == pytest.approx(detectable(last, 0.01), rel=0.05)


@pytest.mark.parametrize(
    "comparisons, seeds, exact",
    [(1, 5, False), (1, 6, True), (3, 6, False), (3, 7, True), (10, 9, True), (1, 21, False)],
)
def test_which_test_decides_is_known_from_how_many_there_are(comparisons: int, seeds: int, exact: bool) -> None:
    assert flips_decide(comparisons, seeds) is exact


def test_a_family_counts_the_members_that_are_not_there() -> None:
    differences = {"a": SIX, "b": (1.0, -2.0, 0.5, 0.1, -0.3, 0.2)}
    found = judge_family(differences, comparisons=4, seeds=6)
    p_values = [paired_t(values) for values in differences.values()]
    expected = multipletests([*p_values, 1.0, 1.0], method="holm")[1]
    assert [one.adjusted for one in found.values()] == pytest.approx(list(expected)[:2])
    assert found["a"].flipped == 2 / 64
    assert found["a"].detectable == pytest.approx(detectable(SIX, 0.05 / 4))
    assert judge_family({}, comparisons=4, seeds=6) == {}


@pytest.mark.parametrize("seeds", [5, 7])
def test_a_member_with_another_number_of_pairs_than_declared_is_refused(seeds: int) -> None:
    with pytest.raises(ValueError, match=rf"a\.n=6: must be the {seeds} declared"):
        judge_family({"a": SIX}, comparisons=1, seeds=seeds)


def test_tost_finds_no_equivalence_at_the_margin_more_often_than_it_says() -> None:
    chance, trials = np.random.default_rng(2), 400
    claims = sum(equivalence(chance.normal(1.0, 0.3, 8).tolist(), 1.0) <= 0.05 for _ in range(trials))
    assert claims / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert equivalence(chance.normal(0.0, 0.3, 8).tolist(), 1.0) < 0.05, "and finds one that is there"


@settings(max_examples=10)
@given(st.dictionaries(st.text(), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_statsmodels_and_worked_by_hand(p_values: dict[str, float]) -> None:
    assert list(holm_adjusted(p_values).values()) == list(multipletests(list(p_values.values()), method="holm")[1])
    assert holm_adjusted({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm_adjusted({}) == {}
    assert holm_adjusted({"a": 0.01, "b": 0.02}, 4) == pytest.approx({"a": 0.04, "b": 0.06})
