"""The tests on paired differences, simulated: how often each is wrong, and how often it finds what is there.

sign-flip interval    covers at least 95% of symmetric data, whatever their tails; of skewed data less
paired t              finds nothing in 5% of nulls at most; two equal readings of a coarse clock fool it
TOST                  calls a difference as large as the margin "the same" in at most 5%
what could be seen    is found in 80% of repetitions by the test that decides; the sign-flip test needs larger effects
"""

import math
from functools import cache

import numpy as np
import pytest
from scipy import stats

from ablations.significance import detectable, detectable_by_flips, equivalence, paired_t, sign_flip_interval
from tests.statistics.draws import LAWS, TRIALS, Numbers, chance, law, pairs


@cache
def subsets(n: int) -> Numbers:
    """A column of weights for each subset of n differences but the empty one: its mean as a product."""
    members = ((np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1).astype(float)
    found: Numbers = (members / members.sum(axis=1, keepdims=True)).T
    return found


def flip_bounds(differences: Numbers) -> tuple[Numbers, Numbers]:
    """The inverted sign-flip test of each row: the means of subsets, less 2.5% of all signings at either end."""
    n = differences.shape[1]
    outside = 2**n // 40
    means = np.sort(differences @ subsets(n), axis=1)
    return means[:, outside - 1], means[:, -outside]


def p_of_t(differences: Numbers) -> Numbers:
    """The paired t test of each row; without spread, what is seen is what is."""
    n = differences.shape[1]
    equal = (differences == differences[:, :1]).all(axis=1)
    spread = np.where(equal, 1.0, differences.std(axis=1, ddof=1)) / math.sqrt(n)
    p_values: Numbers = 2 * stats.t.sf(np.abs(differences.mean(axis=1)) / spread, n - 1)
    return np.where(equal, differences[:, 0] == 0, p_values)


def p_of_tost(differences: Numbers, margin: float) -> Numbers:
    """TOST of each row."""
    n, middle = differences.shape[1], differences.mean(axis=1)
    spread = differences.std(axis=1, ddof=1) / math.sqrt(n)
    sides = ((middle + margin) / spread, (margin - middle) / spread)
    found: Numbers = np.maximum(*(stats.t.sf(side, n - 1) for side in sides))
    return found


def differences(name: str, n: int) -> Numbers:
    """Arm minus baseline without any effect; rounded, for the luck that cancels leaves its last digits behind."""
    arm, baseline = pairs(name, n)
    found: Numbers = np.round(arm - baseline, 9)
    return found


PAIRED = ("normal", "log-normal", "heavy", "exponential", "slowed")  # laws of an arm; their differences are symmetric
SEEDS = (2, 3, 6, 10)
FLIPS = 5000  # trials of the sign-flip interval, which takes the means of a thousand subsets in each


def close(found: float, stated: float, trials: int = TRIALS) -> bool:
    return abs(found - stated / 100) <= math.sqrt(2) * chance(stated / 100, trials) + 0.0005


@pytest.mark.parametrize("n", [6, 7, 8, 10])
@pytest.mark.parametrize("name", PAIRED)
def test_the_sign_flip_interval_covers_95_of_symmetric_data(name: str, n: int) -> None:
    values = differences(name, n)[:FLIPS]
    low, high = flip_bounds(values)
    covered = float(np.mean((low <= 0) & (high >= 0)))
    print(f"{name:12} {n:2} pairs: {100 * covered:.1f}")
    assert covered >= 0.95 - chance(0.95, FLIPS)
    for trial in range(3):
        assert sign_flip_interval(values[trial].tolist()) == pytest.approx((low[trial], high[trial]), abs=1e-9)


SKEWED = {  # percent that cover the mean, by differences: where one arm alone is skewed, nothing is symmetric around it
    "log-normal": {6: 94.8, 8: 92.7, 10: 92.1},
    "exponential": {6: 93.1, 8: 90.7, 10: 91.1},
    "slowed": {6: 73.8, 8: 83.4, 10: 88.3},
}


@pytest.mark.parametrize("name", SKEWED)
def test_the_sign_flip_interval_of_skewed_data_covers_their_mean_less_often(name: str) -> None:
    for n, stated in SKEWED[name].items():
        low, high = flip_bounds(law(name, n)[:FLIPS] - LAWS[name].mean)
        covered = float(np.mean((low <= 1e-9) & (high >= -1e-9)))
        print(f"{name:12} {n:2} values: {100 * covered:.1f}")
        assert close(covered, stated, FLIPS)


@pytest.mark.parametrize("name", PAIRED)
def test_the_paired_t_test_finds_nothing_in_one_null_of_twenty(name: str) -> None:
    for n in SEEDS:
        values = differences(name, n)
        p_values = p_of_t(values)
        found = float(np.mean(p_values <= 0.05))
        print(f"{name:12} {n:2} pairs: {100 * found:.1f} found")
        # Two pairs that fall into the same two heaps scatter hardly at all.
        assert found <= (0.068 if (name, n) == ("slowed", 2) else 0.05) + chance(0.05, TRIALS)
        for trial in range(3):
            assert paired_t(values[trial].tolist()) == pytest.approx(p_values[trial], rel=1e-9)


def test_two_equal_differences_of_a_coarse_clock_are_called_different_though_nothing_is() -> None:
    """They have no spread, so what is seen is what is: false in 12% of nulls with two pairs, harmless from five on."""
    for n, stated in ((2, 12.1), (3, 4.2), (5, 4.6), (8, 5.7)):
        found = float(np.mean(p_of_t(differences("ticks", n)) <= 0.05))
        print(f"ticks {n} pairs: {100 * found:.1f} found")
        assert close(found, stated)


@pytest.mark.parametrize("n", SEEDS)
@pytest.mark.parametrize("name", PAIRED)
def test_tost_calls_a_difference_of_the_margin_the_same_in_one_of_twenty(name: str, n: int) -> None:
    values = differences(name, n)
    margin = 3 * float(values.std()) / math.sqrt(n)  # wide enough to be found; a narrow one is never wrong
    for side in (margin, -margin):
        p_values = p_of_tost(values + side, margin)
        wrong = float(np.mean(p_values <= 0.05))
        print(f"{name:12} {n:2} pairs at {side:+.2f}: {100 * wrong:.1f} called the same")
        assert wrong <= (0.07 if (name, n) == ("slowed", 2) else 0.05) + chance(0.05, TRIALS)
        assert equivalence((values[0] + side).tolist(), margin) == pytest.approx(p_values[0], rel=1e-9)
    assert np.mean(p_of_tost(values, 4 * margin) <= 0.05) > 0.4  # and finds what is the same


# Percent called the same at the margin, 6 seeds: an arm that is much worse now and then, against a steady baseline.
UNSEEN = {
    "normal": 5.0,
    "heavy": 4.2,
    "log-normal": 11.9,
    "exponential": 15.4,
    "slowed": 26.4,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_tost_overlooks_harm_that_most_samples_do_not_show(name: str) -> None:
    values = law(name, 6) - LAWS[name].mean
    margin = 3 * float(law(name, 20).std()) / math.sqrt(6)
    wrong = float(np.mean(p_of_tost(values + margin, margin) <= 0.05))
    print(f"{name:12} {100 * wrong:.1f} called the same")
    assert close(wrong, UNSEEN[name])


POWER = {"normal": (79, 81), "heavy": (80, 90), "log-normal": (80, 83), "exponential": (79, 83), "slowed": (75, 81)}


@pytest.mark.parametrize("n", [2, 3, 6, 10, 20])
@pytest.mark.parametrize("name", POWER)
def test_what_could_have_been_seen_is_seen_in_four_of_five(name: str, n: int) -> None:
    """The true spread is put in; normal data give 80%, others about that."""
    values = differences(name, n)
    unit = np.arange(n) / np.std(np.arange(n), ddof=1)
    effect = detectable(unit.tolist()) * float(values.std())
    found = float(np.mean(p_of_t(values + effect) <= 0.05))
    print(f"{name:12} {n:2} pairs: {100 * found:.1f} found")
    low, high = POWER[name]
    assert low / 100 <= found <= high / 100


def found_by_flips(values: Numbers, alpha: float) -> float:
    """How often the exact sign-flip test at alpha finds a mean above zero: zero lies below the inverted interval."""
    n = values.shape[1]
    outside = int(alpha * 2 ** (n - 1))
    means = np.sort(values @ subsets(n), axis=1)
    return float(np.mean(means[:, outside - 1] > 0))


SHORT = {6: 0.62, 7: 0.77, 8: 0.78, 10: 0.79}  # power of the sign-flip test at the effect that the t test would see


@pytest.mark.parametrize("n, comparisons", [(6, 1), (7, 1), (8, 1), (10, 1), (7, 3), (8, 3), (9, 9), (10, 9)])
def test_what_the_sign_flip_test_could_have_seen_is_seen_in_four_of_five(n: int, comparisons: int) -> None:
    alpha = 0.05 / comparisons
    unit = (np.arange(n) / np.std(np.arange(n), ddof=1)).tolist()
    draws = np.random.default_rng([n, comparisons]).standard_normal((FLIPS, n))
    flips, t = (found_by_flips(draws + size(unit, alpha), alpha) for size in (detectable_by_flips, detectable))
    print(f"{n:2} pairs, {comparisons} comparisons: {100 * flips:.1f} found, {100 * t:.1f} at the t test's effect")
    assert abs(flips - 0.8) <= math.sqrt(2) * chance(0.8, 4000)  # the effect is simulated too, from 4000 draws
    if comparisons == 1:
        assert t == pytest.approx(SHORT[n], abs=chance(0.8, FLIPS))


@pytest.mark.parametrize("n, low, high", [(2, 7, 99), (3, 11, 99), (6, 29, 98), (10, 40, 97), (20, 54, 94)])
def test_with_few_seeds_what_could_have_been_seen_is_itself_uncertain(n: int, low: float, high: float) -> None:
    """It is computed from the spread seen, not the true one: the true power there, in nine of ten studies."""
    spreads = law("normal", n).std(axis=1, ddof=1)[:2000] / 0.1
    unit = np.arange(n) / np.std(np.arange(n), ddof=1)
    effects = detectable(unit.tolist()) * spreads
    edge = stats.t.ppf(0.975, n - 1)
    found = np.quantile(stats.nct.sf(edge, n - 1, effects * math.sqrt(n)), (0.05, 0.95))
    print(f"{n:2} pairs: power between {100 * found[0]:.0f}% and {100 * found[1]:.0f}%")
    assert found == pytest.approx((low / 100, high / 100), abs=0.03)
