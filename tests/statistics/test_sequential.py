"""The paired timing gate looks after every block and stops when it pleases: its errors are those of the whole run.

evidence   a bet that can be expected to win nothing: P(ever 20 times the capital) <= 1/20 if the median is where
           the null says, whatever the noise, whatever happened before
interval   holds the median at all looks at once in at least 90% of runs
decide     calls anything different that is not in at most 5% of runs; calls a difference of the margin the same in
           at most 5%
"""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from bench.ab.decide import ALPHA, MARGIN, WEIGHT, Rate, decide, decided, evidence, interval
from tests.statistics.draws import Numbers, chance

BLOCKS = 120  # looks of a run
RUNS = 4000

FOUND = {
    1.05: (1, 2, 3),
    1.1: (11, 23, 80),
    1.2: (76, 99, 100),
}  # percent found, after 20, 40, 120 blocks
NOISE = {  # of the logarithm of a block's ratio, its median 0; several times what blocks of a loaded machine scatter by
    "normal": lambda random, shape: 0.13 * random.standard_normal(shape),
    "heavy": lambda random, shape: 0.08 * random.standard_t(2, shape),
    "skewed": lambda random, shape: 0.1 * (random.exponential(size=shape) - math.log(2)),
    "drifting": lambda random, shape: np.linspace(0.02, 0.3, shape[-1]) * random.standard_normal(shape),
}


def ratios(name: str, truth: float, cases: int = 1, runs: int = RUNS) -> Numbers:
    """Ratios of the blocks of every run and case, their median as given."""
    random = np.random.default_rng([cases, *name.encode()])
    found: Numbers = truth * np.exp(NOISE[name](random, (runs, cases, BLOCKS)))
    return found


@cache
def table() -> Numbers:
    """The evidence after k of n bets won."""
    found = np.zeros((BLOCKS + 1, BLOCKS + 1))
    for bets in range(BLOCKS + 1):
        for won in range(bets + 1):
            found[won, bets] = evidence(won, bets)
    return found


def course(wins: NDArray[np.bool_]) -> Numbers:
    """The evidence after each block of each run."""
    found: Numbers = table()[np.cumsum(wins, axis=-1), np.arange(1, BLOCKS + 1)]
    return found


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_bet_on_a_fair_coin_can_be_expected_to_win_nothing(won: int, lost: int) -> None:
    bets = won + lost
    after = (evidence(won + 1, bets + 1) + evidence(won, bets + 1)) / 2
    assert after == pytest.approx(evidence(won, bets), rel=1e-9, abs=1e-300)


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_evidence_is_the_mean_over_all_bets(won: int, lost: int) -> None:
    """By hand: q from 1/2 to 1 in 20,000 steps, each multiplying the capital by 2q or 2(1 - q)."""
    q = 0.5 + (np.arange(20_000) + 0.5) / 40_000
    capital = np.exp(won * np.log(2 * q) + lost * np.log(2 * (1 - q)))
    assert evidence(won, won + lost) == pytest.approx(np.average(capital, weights=q**WEIGHT), rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.45, 0.3])
def test_twenty_times_the_capital_comes_ever_to_one_in_twenty_at_most(share: float) -> None:
    wins = np.random.default_rng(0).random((20_000, BLOCKS)) < share
    ever = float((course(wins).max(axis=1) >= 20).mean())
    print(f"a coin of {share}: ever 20 times the capital in {100 * ever:.2f}%")
    assert ever <= 0.05 + chance(0.05, 20_000)
    assert ever > 0.01 or share < 0.5  # at the border it is not idle either


def test_a_null_that_answers_to_what_happened_before_gains_nothing() -> None:
    """Blocks that hang together: after a loss a win is as likely as the null allows, after a win less."""
    random = np.random.default_rng(1)
    wins = np.zeros((20_000, BLOCKS), dtype=bool)
    for block in range(BLOCKS):
        likely = 0.5 if block == 0 else np.where(wins[:, block - 1], 0.35, 0.5)
        wins[:, block] = random.random(len(wins)) < likely
    assert (course(wins).max(axis=1) >= 20).mean() <= 0.05


@pytest.mark.parametrize("name", NOISE)
def test_the_interval_holds_the_median_at_every_look_of_nine_runs_in_ten(name: str) -> None:
    above = ratios(name, 1.0)[:, 0] > 1.0
    missed = np.maximum(course(above), course(~above)).max(axis=1) >= 20
    print(f"{name:9} misses at some look: {100 * missed.mean():.2f}%")
    assert missed.mean() <= 0.10 + chance(0.10, RUNS)


@pytest.mark.parametrize("look", [5, 6, 10, 30, BLOCKS])
def test_the_interval_is_where_neither_side_has_won_twenty_times_its_capital(look: int) -> None:
    values = np.sort(ratios("heavy", 1.0, runs=1)[0, 0, :look])
    low, high = interval(values.tolist()) or (0.0, math.inf)
    for value in [values[0] / 2, *np.sqrt(values[1:] * values[:-1]), values[-1] * 2]:
        above = int((values > value).sum())
        assert (low <= value <= high) == (max(evidence(above, look), evidence(look - above, look)) < 20)


def called(values: Numbers) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """At every look, which cases of each run are called different (Holm over the cases), and which the same."""
    evidences = [course(values > 1 + MARGIN), course(values < 1 / (1 + MARGIN))]
    p_values = np.minimum(1.0, 2 / sum(evidences))
    cases = values.shape[1]
    order = np.argsort(p_values, axis=1)
    limits = ALPHA / (cases - np.arange(cases))
    passed = np.logical_and.accumulate(np.take_along_axis(p_values, order, axis=1) <= limits[:, None], axis=1)
    different = np.empty_like(passed)
    np.put_along_axis(different, order, passed, axis=1)
    inside = (course(values < 1 + MARGIN) >= 20) & (course(values > 1 / (1 + MARGIN)) >= 20)
    return different, inside & ~different


@pytest.mark.parametrize("cases", [1, 6])
@pytest.mark.parametrize("truth", [1.0, 1 + MARGIN])
@pytest.mark.parametrize("name", NOISE)
def test_a_run_in_which_nothing_differs_says_so_of_none_in_nineteen_of_twenty(
    name: str, truth: float, cases: int
) -> None:
    different, same = (found.any(axis=2) for found in called(ratios(name, truth, cases, runs=1500)))
    wrong = float(different.any(axis=1).mean())
    print(f"{name:9} {cases} cases at {truth:.2f}: {100 * wrong:.2f}% of runs call one different")
    assert wrong <= ALPHA + chance(ALPHA, 1500)
    if truth > 1:
        print(f"{name:9} {cases} cases at {truth:.2f}: {100 * same.mean():.2f}% of cases called the same")
        assert same.mean() <= 0.05 + chance(0.05, 1500)


@pytest.mark.parametrize("name", NOISE)
def test_what_is_simulated_is_what_the_gate_decides(name: str) -> None:
    for truth in (1.0, 1.1):
        values = ratios(name, truth, cases=3, runs=2)
        different, same = called(values)
        for run, look in ((0, 8), (0, 40), (1, BLOCKS)):
            found = decide({str(at): row.tolist() for at, row in enumerate(values[run, :, :look])})
            for at in range(3):
                assert found[str(at)].different == different[run, at, look - 1]
                assert (found[str(at)].finding == "same") == same[run, at, look - 1]
            assert decided(found) == (different | same)[run, :, look - 1].all()


@pytest.mark.parametrize("slower", [1.05, 1.1, 1.2])
def test_a_slow_down_is_found_sooner_the_larger_it_is(slower: float) -> None:
    """All six cases slowed, blocks that scatter by 13%: the share found after 20, 40 and 120 blocks."""
    different, _ = called(ratios("normal", slower, 6, runs=400))
    found = [float(different[:, :, :look].any(axis=2).mean()) for look in (20, 40, BLOCKS)]
    print(f"{slower:.2f} of the time: " + ", ".join(f"{100 * share:.0f}%" for share in found))
    for share, stated in zip(found, FOUND[slower], strict=True):
        assert share == pytest.approx(stated / 100, abs=0.05)


@pytest.mark.parametrize("of", [20, 40, 300])
def test_the_bounds_of_a_rate_hold_it_however_rare_it_is(of: int) -> None:
    """False alarms and power are printed with them; a rate that never happened is bounded too."""
    bounds = np.array([Rate(happened, of).bounds for happened in range(of + 1)])
    for truth in np.linspace(0, 1, 101):
        held = (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
        assert stats.binom.pmf(np.flatnonzero(held), of, truth).sum() >= 0.95 - 1e-12
    assert Rate(0, 300).bounds[1] == pytest.approx(1 - 0.025 ** (1 / 300))
