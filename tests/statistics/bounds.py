"""The 95% intervals of many trials at once, a row each; test_coverage.py holds them against the project's own."""

import math

import numpy as np
from scipy import stats

from tests.statistics.draws import Numbers

Bounds = tuple[Numbers, Numbers]


def t_bounds(samples: Numbers) -> Bounds:
    """Student's interval of the mean of each row."""
    n = samples.shape[1]
    half = stats.t.ppf(0.975, n - 1) * samples.std(axis=1, ddof=1) / math.sqrt(n)
    middle = samples.mean(axis=1)
    return middle - half, middle + half


def geometric_bounds(samples: Numbers) -> Bounds:
    """The same of logarithms, as factors."""
    low, high = t_bounds(np.log(samples))
    return np.exp(low), np.exp(high)


def median_bounds(samples: Numbers) -> Bounds:
    """The interval of the median of each row: order statistics, or Student's of the logarithms below six samples."""
    n, middle = samples.shape[1], np.median(samples, axis=1)
    if n < 6:
        low, high = geometric_bounds(samples)
        return np.minimum(low, middle), np.maximum(high, middle)
    outside = sum(stats.binom.cdf(rank, n, 0.5) <= 0.025 for rank in range(n))
    ordered = np.sort(samples, axis=1)
    return ordered[:, outside - 1], ordered[:, n - outside]
