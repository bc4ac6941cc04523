"""95% intervals for small samples: of a median where the samples allow one, of a mean where they do not.

The interval of a median comes from the order statistics (the inverted sign test, exact whatever the distribution); it
exists from 6 samples on, since the chance that all n lie on one side is 2 * 2^-n. Below that stands Student's t on the
logarithms, which assumes that ratios scatter like products of many small factors. A bootstrap of so few samples
covers less than it says, so none is here.
"""

import math
from collections.abc import Sequence
from statistics import median

from scipy import stats

LEVEL = 0.95


def of_median(samples: Sequence[float], *, level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the median of positive samples at `level`, or None for a single sample.

    Raises:
        ValueError: samples that are not all positive (times and ratios are).
    """
    if not samples or min(samples) <= 0.0:
        raise ValueError(
            f"samples={list(samples)!r}: must be positive numbers, as times and ratios are; check the meter"
        )
    if len(samples) == 1:
        return None
    interval = stats.quantile_test(samples, q=median(samples), p=0.5).confidence_interval(level)
    if not math.isnan(interval.low):
        return float(interval.low), float(interval.high)
    logarithms = [math.log(sample) for sample in samples]
    spread = stats.sem(logarithms)
    middle = sum(logarithms) / len(logarithms)
    half = float(stats.t.ppf((1 + level) / 2, len(samples) - 1) * spread)
    return math.exp(middle - half), math.exp(middle + half)
