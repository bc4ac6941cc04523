"""How often chance alone makes the project say something: tests, families of tests, verdicts and the diff of two runs.

sign_flip   p <= a in at most a of all cases, whatever a, if the sign of every difference is arbitrary
holm        one wrong finding or more in at most 5% of families, however their members hang together
decide      wrong in at most 2.5% where the truth lies on the border of the claim; that is all a 95% interval gives
diff        "changed" of two runs of the same code: about 1 figure in 200
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ablations.claims import Outcome
from ablations.evidence import Estimate, decide, sign_flip
from ablations.significance import holm_adjusted
from bench.record import append
from reports.diff import diff
from tests.statistics.bounds import t_bounds
from tests.statistics.draws import LAWS, Numbers, chance, law, record

TRIALS = 20_000
Flags = NDArray[np.bool_]


def signs(n: int) -> Numbers:
    """All 2^n rows of signs."""
    found: Numbers = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    return found


def flipped(sizes: Numbers) -> Numbers:
    """The exact two-sided p of every way to sign the differences: twice the smaller share of sums at or beyond it."""
    sums = np.round(signs(len(sizes)) @ sizes, 9)
    ordered = np.sort(sums)
    at_least = len(sums) - np.searchsorted(ordered, sums, side="left")
    at_most = np.searchsorted(ordered, sums, side="right")
    found: Numbers = np.minimum(1.0, 2 * np.minimum(at_least, at_most) / len(sums))
    return found


def exceeds_its_level(p_values: Numbers) -> bool:
    """Whether some p is as small or smaller more often than it says."""
    ordered = np.sort(p_values)
    return bool(np.any(np.searchsorted(ordered, ordered, side="right") / len(ordered) > ordered + 1e-12))


SIZES: dict[str, Callable[[int], Numbers]] = {
    "of any size": lambda n: np.abs(np.random.default_rng(n).standard_normal(n)),
    "one much larger": lambda n: np.array([*range(1, n), 1000.0]),
    "of equal size": lambda n: np.ones(n),
    "some of them zero": lambda n: np.array([0.0, 0.0, *range(1, n - 1)]),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("n", [5, 6, 7, 8, 9, 10])
def test_p_of_the_sign_flip_test_is_no_smaller_than_chance_makes_it(n: int, kind: str) -> None:
    sizes = SIZES[kind](n)
    p_values = flipped(sizes)
    assert not exceeds_its_level(p_values)
    assert exceeds_its_level(p_values * 0.9)  # the check can fail
    ways = range(2**n) if n == 5 else np.random.default_rng(n).integers(0, 2**n, 20)
    for way in ways:
        assert sign_flip((signs(n)[way] * sizes).tolist()) == pytest.approx(p_values[way], rel=1e-12)


def rejected(p_values: Numbers, alpha: float = 0.05) -> Flags:
    """Holm's rejections, a family in each row: the k-th smallest of m against alpha / (m - k + 1), until one fails."""
    order = np.argsort(p_values, axis=1)
    m = p_values.shape[1]
    passed = np.take_along_axis(p_values, order, axis=1) <= alpha / (m - np.arange(m))
    passed = np.logical_and.accumulate(passed, axis=1)
    found = np.empty_like(passed)
    np.put_along_axis(found, order, passed, axis=1)
    return found


def scores(kind: str, m: int) -> Numbers:
    """Standard normal scores of m comparisons in every trial, related as `kind` says."""
    random = np.random.default_rng([m, *kind.encode()])
    own = random.standard_normal((TRIALS, m))
    shared = random.standard_normal((TRIALS, 1))
    match kind:
        case "apart":
            return own
        case "one baseline":  # each arm minus the same baseline: half of the variance is shared
            return (own + shared) / math.sqrt(2)
        case "all the same":
            return np.repeat(shared, m, axis=1)
        case _:  # every second one against the others
            return (0.3 * own + 0.7 * shared * np.where(np.arange(m) % 2, 1, -1)) / math.hypot(0.3, 0.7)


@pytest.mark.parametrize("kind", ["apart", "one baseline", "all the same", "opposed"])
@pytest.mark.parametrize("m", [2, 5, 20])
def test_holm_finds_anything_among_nulls_in_one_family_of_twenty(kind: str, m: int) -> None:
    p_values = 2 * stats.norm.sf(np.abs(scores(kind, m)))
    nulls = rejected(p_values).any(axis=1).mean()
    assert nulls <= 0.05 + chance(0.05, TRIALS)
    # Where every second effect is real, the others are still nulls, and less of the error is left to spend on them.
    p_values[:, ::2] = 2 * stats.norm.sf(np.abs(scores(kind, m)[:, ::2] + 3))
    mixed = rejected(p_values)[:, 1::2].any(axis=1).mean()
    print(f"{m:3} {kind:13} all nulls {nulls:.3f}, half of them {mixed:.3f}")
    assert mixed <= 0.05 + chance(0.05, TRIALS)
    uncorrected = (2 * stats.norm.sf(np.abs(scores(kind, m))) <= 0.05).any(axis=1).mean()
    assert uncorrected > 0.06 or kind in ("all the same", "opposed")  # what Holm is for


@pytest.mark.parametrize("m", [2, 5, 20])
def test_what_is_simulated_as_holm_is_what_the_project_computes(m: int) -> None:
    p_values = np.random.default_rng(m).random((4, m)) ** 4
    for row, expected in zip(p_values, rejected(p_values), strict=True):
        adjusted = holm_adjusted({str(at): p for at, p in enumerate(row.tolist())})
        assert [p <= 0.05 for p in adjusted.values()] == expected.tolist()


def test_holm_over_sign_flip_tests_of_one_baseline_keeps_its_error() -> None:
    """8 seeds, 5 arms against one baseline, nothing but noise: the discrete p of 256 flips, and their dependence."""
    n, m, trials = 8, 5, 4000
    random = np.random.default_rng(8)
    differences = random.standard_t(3, (trials, m, n)) - random.standard_t(3, (trials, 1, n))
    sums = np.round(differences @ signs(n).T, 9)  # the first flip is none
    at_least = (sums >= sums[:, :, :1]).mean(axis=2)
    at_most = (sums <= sums[:, :, :1]).mean(axis=2)
    p_values = np.minimum(1, 2 * np.minimum(at_least, at_most))
    assert sign_flip(differences[0, 0].tolist()) == pytest.approx(p_values[0, 0])
    assert rejected(p_values).any(axis=1).mean() <= 0.05 + chance(0.05, trials)
    assert (p_values <= 0.05).any(axis=1).mean() > 0.1  # uncorrected


def outcomes(bounds: tuple[Numbers, Numbers], **region: float) -> list[Outcome]:
    return [
        decide(Estimate((low + high) / 2, low, high, 6), "", **region).outcome
        for low, high in zip(*(part.tolist() for part in bounds), strict=True)
    ]


# Percent of wrong verdicts of 6 seeds when the truth lies just outside: claims of at least, and of at most, the mean.
WRONG = {
    "normal": (2.5, 2.5),
    "heavy": (1.9, 1.9),
    "log-normal": (0.5, 7.7),  # skewed: the mean is mostly underestimated
    "exponential": (0.4, 11.2),
    "slowed": (0.1, 26.4),
    "rare": (0.1, 53.3),  # none seen in six is no proof that there are few
}


@pytest.mark.parametrize("name", WRONG)
def test_a_truth_on_the_border_is_decided_wrongly_as_often_as_stated(name: str) -> None:
    border, bounds, rounding = LAWS[name].mean, t_bounds(law(name, 6)), 1e-9
    for which, stated in zip(("at_least", "at_most"), WRONG[name], strict=True):
        outside = border + rounding * (1 if which == "at_least" else -1)
        found = outcomes(bounds, **{which: outside})
        wrong = found.count(Outcome.HOLDS) / TRIALS
        print(f"{name:12} {which} the truth: {100 * wrong:.1f} wrong")
        assert wrong == pytest.approx(stated / 100, abs=math.sqrt(2) * chance(wrong, TRIALS) + 0.0005)
        assert found.count(Outcome.FAILS) / TRIALS <= max(WRONG[name]) / 100 + chance(0.05, TRIALS)


def test_a_claim_of_a_range_is_decided_wrongly_in_one_of_forty_at_either_end() -> None:
    low, high = t_bounds(law("normal", 6))
    for truth in (0.8, 1.2):
        found = outcomes((low - 1 + truth, high - 1 + truth), at_least=0.8, at_most=1.2)
        assert found.count(Outcome.FAILS) / TRIALS <= 0.025 + chance(0.025, TRIALS)
        assert found.count(Outcome.HOLDS) / TRIALS <= 0.025 + chance(0.025, TRIALS)


@pytest.mark.parametrize("seeds", [3, 6, 20])
def test_two_runs_of_a_study_hardly_ever_contradict_each_other(seeds: int) -> None:
    """One says "holds" and the other "fails"; wherever the truth lies, one of them has then hit its 2.5%."""
    once, again = (t_bounds(part) for part in np.hsplit(law("normal", 2 * seeds), 2))
    worst = 0.0
    for distance in np.linspace(-0.3, 0.3, 25):
        pairs = [(low > 1 + distance, high < 1 + distance) for low, high in (once, again)]
        against = (pairs[0][0] & pairs[1][1]) | (pairs[0][1] & pairs[1][0])
        worst = max(worst, float(against.mean()))
    print(f"{seeds} seeds: at most {100 * worst:.2f}% of pairs of runs contradict each other")
    assert worst <= 2 * 0.025**2 + chance(2 * 0.025**2, TRIALS)


CHANGED = {  # percent of equal runs that the diff calls changed, by seeds
    "normal": {2: 0.3, 3: 0.5, 6: 0.6, 20: 0.6},
    "heavy": {2: 0.3, 3: 0.3, 6: 0.3, 20: 0.5},
    "exponential": {2: 0.5, 3: 0.5, 6: 0.6, 20: 0.7},
    "slowed": {2: 4.1, 3: 0.8, 6: 0.9, 20: 1.3},  # equal samples have intervals without width, which exclude each other
    "ticks": {2: 4.5, 3: 0.9, 6: 0.5, 20: 0.5},
}


@pytest.mark.parametrize("name", CHANGED)
def test_the_diff_of_two_equal_runs_calls_one_figure_in_two_hundred_changed(name: str, tmp_path: Path) -> None:
    for seeds, stated in CHANGED[name].items():
        before, after = np.hsplit(law(name, 2 * seeds), 2)
        (low, high), (low_after, high_after) = t_bounds(before), t_bounds(after)
        apart = (high < low_after) | (high_after < low)
        print(f"{name:12} {seeds:2} seeds: {100 * apart.mean():.2f}% changed")
        assert apart.mean() == pytest.approx(stated / 100, abs=1.5 * chance(stated / 100, TRIALS) + 0.0005)
        shown = [*np.flatnonzero(apart)[:3], *np.flatnonzero(~apart)[:3]]
        for which, values in (("before", before), ("after", after)):
            rows = [
                record(value, seed=seed, axes={"trial": int(trial)})
                for trial in shown
                for seed, value in enumerate(values[trial].tolist())
            ]
            append(tmp_path / str(seeds) / which / "records.jsonl", rows)
        found = diff(tmp_path / str(seeds) / "before", tmp_path / str(seeds) / "after")
        verdicts = {point.axes["trial"]: point.verdict for point in found.points}
        assert verdicts == {int(trial): "changed" if apart[trial] else "same" for trial in shown}
