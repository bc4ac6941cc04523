"""Tests on paired differences d_1 .. d_n, one per seed: is there an effect, is there none that matters, how small an
effect could be seen.

    effect        exact sign-flip test (ablations/evidence.py), inverted into an interval here; paired t test
    no harm       two one-sided t tests (TOST; Schuirmann 1987): the mean lies inside (-margin, +margin), with the
                  margin declared before
    sight         the smallest mean that a t test at alpha finds with 80% power, given the spread of the differences

The interval that inverts the sign-flip test needs no normality, only differences symmetric around theta. Flipping the
set F keeps the sum of d - theta at least as large exactly if the mean of F is at most theta, so the p of theta is
2 (1 + #{F: mean of F <= theta}) / 2^n on its lower side, and the ends are order statistics of the 2^n - 1 means of
subsets (Hartigan 1969). Differences that are all equal have no spread to test against: their signs alone are evidence.
"""

import math
from collections.abc import Mapping, Sequence

from dsv3.config.rules import require

ALPHA = 0.05
POWER = 0.8
MOST = 20  # pairs whose signs can all be tried: a million ways


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
    from scipy.stats import nct, t

    n = len(differences)
    edge = float(t.ppf(1 - alpha / 2, n - 1))

    # statsmodels' TTestPower adds the far tail, for which scipy's noncentral t is often nan with 2 or 3 pairs.
    def lacking(effect: float) -> float:
        return power - float(nct.sf(edge, n - 1, effect * math.sqrt(n)))

    most = 1.0
    while lacking(most) > 0:
        most *= 2
    return float(brentq(lacking, 0.0, most)) * stdev(differences)


def holm_adjusted(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values of a family of comparisons as Holm adjusts them: compare each with the family-wise error."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return {}
    return dict(zip(p_values, multipletests(list(p_values.values()), method="holm")[1].tolist(), strict=True))
