"""95% intervals for small samples: of a median where the samples allow one, of a mean where they do not.

The interval of a median comes from the order statistics (the inverted sign test, exact whatever the distribution); it
exists from 6 samples on, since the chance that all n lie on one side is 2 * 2^-n. Below that stands Student's t on the
logarithms, which assumes that ratios scatter like products of many small factors. A bootstrap of so few samples
covers less than it says, so none is here.
"""

import math
from collections.abc import Sequence
from statistics import median, stdev

from scipy.special import stdtrit  # what scipy.stats.t.ppf calls; all of scipy.stats takes each process half a second

LEVEL = 0.95


def of_median(samples: Sequence[float], *, level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the median of positive samples at `level`, the median itself always in it.

    None where nothing bounds it: of a single sample, and of a few so far apart that a bound is beyond every float.

    Raises:
        ValueError: samples that are not all positive and finite (times and ratios are), or a level outside (0, 1).
    """
    if not samples or not all(0.0 < sample < math.inf for sample in samples):
        raise ValueError(
            f"samples={list(samples)!r}: must be positive finite numbers, as times and ratios are; check the meter"
        )
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level!r}: must lie between 0 and 1; {LEVEL} is what records hold")
    if len(samples) == 1:
        return None
    middle = median(samples)
    if left_out := _left_out(len(samples), level):
        ordered = sorted(map(float, samples))
        return ordered[left_out - 1], ordered[-left_out]
    bounds = _log_t(samples, level)
    # Rounding of logarithms puts equal samples outside their own interval.
    return None if bounds is None else (min(bounds[0], middle), max(bounds[1], middle))


def _left_out(n: int, level: float) -> int:
    """How many order statistics the interval reaches inward from either end, 0 where even all n samples are too few:
    the most k for which fewer than k of n fair coins show heads in less than (1 - level) / 2 of all cases.
    """
    cases, k = 0, -1
    while cases / 2**n < (1 - level) / 2:
        k += 1
        cases += math.comb(n, k)
    return k


def _log_t(samples: Sequence[float], level: float) -> tuple[float, float] | None:
    logarithms = [math.log(sample) for sample in samples]
    half = float(stdtrit(len(samples) - 1, (1 + level) / 2)) * stdev(logarithms) / math.sqrt(len(samples))
    center = math.fsum(logarithms) / len(logarithms)
    try:
        return math.exp(center - half), math.exp(center + half)
    except OverflowError:
        return None
