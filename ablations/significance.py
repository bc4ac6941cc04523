"""Tests on paired differences d_1 .. d_n, one per seed: is there an effect, is there none that matters, how small an
effect could be seen.

    effect        exact sign-flip test (ablations/evidence.py), inverted into an interval here; paired t test
    no harm       two one-sided t tests (TOST; Schuirmann 1987): the mean lies inside (-margin, +margin), with the
                  margin declared before
    sight         the smallest mean that the deciding test finds with 80% power, given the spread of the differences;
                  or how many pairs it takes to find a mean that is asked about

Several such tests are a family under Holm, whose size m and number of seeds n are declared before the first cell; a
member that is not measured counts as no finding. The exact sign-flip test decides where it can find anything, with
n >= 1 + log2(m / alpha), else the paired t test, which assumes normal differences: m and n alone say which.

The interval that inverts the sign-flip test needs no normality, only differences symmetric around theta. Flipping the
set F keeps the sum of d - theta at least as large exactly if the mean of F is at most theta, so the p of theta is
2 (1 + #{F: mean of F <= theta}) / 2^n on its lower side, and the ends are order statistics of the 2^n - 1 means of
subsets (Hartigan 1969). Differences that are all equal have no spread to test against: their signs alone are evidence.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from ablations.evidence import seeds_needed, sign_flip
from dsv3.config.rules import require

ALPHA = 0.05
POWER = 0.8
MOST = 20  # pairs whose signs can all be tried: a million ways
SIMULATED = 14  # pairs up to which the power of the sign-flip test is simulated: about a second
DRAWS = 4000  # of them: the power is then 80% within 2 points


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is said of one member of a family.

    flipped     p of its exact sign-flip test by itself; None beyond 20 pairs
    adjusted    p of the test that decides, after Holm over the declared family
    detectable  smallest effect that this test finds at alpha / m with 80% power, at the spread seen
    """

    flipped: float | None
    adjusted: float
    detectable: float


def flips_decide(comparisons: int, seeds: int) -> bool:
    """Whether the exact sign-flip test decides a family of so many comparisons over so many seeds, not the t test."""
    return seeds_needed(comparisons, ALPHA) <= seeds <= MOST


def judge_family(differences: Mapping[str, Sequence[float]], *, comparisons: int, seeds: int) -> dict[str, Judged]:
    """The members of a family that have all their pairs, by name; those of its `comparisons` that are missing weigh as
    much as if nothing had been found in them.

    Raises:
        ValueError: a member with more or fewer pairs than declared, which would decide early or anew.
    """
    for name, values in differences.items():
        require(len(values) == seeds, f"{name}.n", len(values), f"must be the {seeds} declared", "run them all")
    exact = flips_decide(comparisons, seeds)
    flipped = {name: sign_flip(values) for name, values in differences.items()} if seeds <= MOST else {}
    chosen = flipped if exact else {name: paired_t(values) for name, values in differences.items()}
    adjusted = holm_adjusted(chosen, comparisons)
    seen = detectable_by_flips if exact else detectable
    return {
        name: Judged(
            flipped=flipped.get(name), adjusted=adjusted[name], detectable=seen(values, alpha=ALPHA / comparisons)
        )
        for name, values in differences.items()
    }


def sign_flip_interval(differences: Sequence[float], level: float = 1 - ALPHA) -> tuple[float, float] | None:
    """The interval of the centre of symmetry whose every value the exact sign-flip test at 1 - `level` lets stand.

    It covers at least `level`; None with so few pairs that every value stands (5 or fewer at 95%).

    Raises:
        ValueError: no difference, or more than 20 (their t interval is as good, and costs nothing).
    """
    import numpy as np

    n = len(differences)
    require(0 < n <= MOST, "n", n, f"must be 1 to {MOST} paired differences", "beyond, take the t interval")
    sums, sizes = np.zeros(1), np.zeros(1)
    for difference in differences:
        sums = np.concatenate((sums, sums + difference))
        sizes = np.concatenate((sizes, sizes + 1))
    means = np.sort(sums[1:] / sizes[1:])
    outside = math.floor((1 - level) * 2 ** (n - 1) + 1e-9)  # 1 - 0.95 is a little more than 0.05
    if outside == 0:
        return None
    return float(means[outside - 1]), float(means[-outside])


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t test, at least 2 differences; equal ones have the p of their signs, 2 / 2^n."""
    from scipy.stats import ttest_1samp

    if len(set(differences)) == 1:
        return 2.0 ** (1 - len(differences)) if differences[0] else 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def equivalence(differences: Sequence[float], margin: float) -> float:
    """p of TOST that the mean difference lies outside (-margin, +margin): small means that it lies inside.

    Raises:
        ValueError: a margin that is not above 0: no data can show that two arms are equal to the last digit; a single
            difference, which has no spread.
    """
    import numpy as np
    from statsmodels.stats.weightstats import ttost_paired

    require(len(differences) > 1, "n", len(differences), "must be at least 2 paired differences", "run more seeds")
    require(margin > 0, "margin", margin, "must be above 0", "declare what is too little to matter")
    if len(set(differences)) == 1:
        return 2.0 ** -len(differences) if abs(differences[0]) < margin else 1.0
    values = np.asarray(differences, dtype=float)
    return float(ttost_paired(values, np.zeros_like(values), -margin, margin)[0])


def detectable(differences: Sequence[float], alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest mean difference that a two-sided paired t test at `alpha` finds with that power, at the spread seen
    here; findings of the wrong sign are not counted.
    """
    from statistics import stdev

    from scipy.optimize import brentq

    n, most = len(differences), 1.0
    while _found(most, n, alpha) < power:
        most *= 2
    return float(brentq(lambda effect: power - _found(effect, n, alpha), 0.0, most)) * stdev(differences)


def pairs_to_see(effect: float, differences: Sequence[float], alpha: float = ALPHA, power: float = POWER) -> int:
    """The fewest pairs with which a two-sided paired t test at `alpha` finds a mean difference of `effect` with that
    power, at the spread seen here; 2, the fewest that it takes, where there is none.

    Raises:
        ValueError: an effect that is not above 0, which no number of pairs tells from none.
    """
    from statistics import stdev

    require(effect > 0, "effect", effect, "must be above 0", "say which difference should be seen")
    spread = stdev(differences)
    if spread == 0.0:
        return 2
    most = 2
    while _found(effect / spread, most, alpha) < power:
        most *= 2
    return 2 + bisect_left(range(2, most), power, key=lambda n: _found(effect / spread, n, alpha))


def _found(effect: float, n: int, alpha: float) -> float:
    """How often a two-sided paired t test finds an effect in standard deviations, and its sign."""
    from scipy.stats import nct, t

    # statsmodels' TTestPower adds the far tail, for which scipy's noncentral t is often nan with 2 or 3 pairs.
    return float(nct.sf(float(t.ppf(1 - alpha / 2, n - 1)), n - 1, effect * math.sqrt(n)))


def detectable_by_flips(differences: Sequence[float], alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest mean difference that the exact sign-flip test at `alpha` finds with that power, were the differences
    normal with the spread seen here; findings of the wrong sign are not counted.

    Beyond 14 pairs it is that of the t test, which is then less than 5% off.
    """
    from statistics import stdev

    n = len(differences)
    return detectable(differences, alpha, power) if n > SIMULATED else _flips_see(n, alpha, power) * stdev(differences)


@cache
def _flips_see(n: int, alpha: float, power: float) -> float:
    """The same in standard deviations.

    A mean moves the interval of the inverted test along, so the effect at which one draw is found is how far its
    interval reaches beyond zero, and the effect that is found in 80% of draws the quantile of that.
    """
    import numpy as np
    from scipy.stats import norm

    outside = math.floor(alpha * 2 ** (n - 1) + 1e-9)
    if outside == 0:
        return math.inf  # too few pairs to find anything
    if outside == 1:  # found when all n signs agree
        return float(norm.ppf(power ** (1 / n)))
    draws = np.random.default_rng(0).standard_normal((DRAWS, n)).tolist()
    nothing = (-math.inf, math.inf)
    return float(np.quantile([(sign_flip_interval(draw, 1 - alpha) or nothing)[1] for draw in draws], power))


def holm_adjusted(p_values: Mapping[str, float], comparisons: int | None = None) -> dict[str, float]:
    """The p-values of a family of comparisons as Holm adjusts them: compare each with the family-wise error.

    Of a family of `comparisons` those without a p-value are nulls.
    """
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return {}
    missing = 0 if comparisons is None else comparisons - len(p_values)
    adjusted = multipletests([*p_values.values(), *[1.0] * missing], method="holm")[1].tolist()
    return dict(zip(p_values, adjusted[: len(p_values)], strict=True))
