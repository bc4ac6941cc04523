"""How often the project's 95% intervals hold the truth: simulated, in percent, by law of the data and sample size.

The tables are what 20,000 trials gave, and the tests measure it again; `pytest -s` prints it. A row that falls below 95
has its reason in SHORT: no interval of three samples is right for every law, and this says where ours are not.

    median      bench.interval.of_median: times and ratios over blocks, windows and processes
    mean        ablations.evidence.mean and summarise: losses and shares over seeds
    geometric   the same of ratios
    difference  ablations.evidence.compare: the arm minus the baseline, pairs that share the luck of their seed
    ratio       the same as a quotient
"""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from ablations.evidence import compare, summarise
from ablations.evidence import mean as mean_of
from bench.interval import of_median
from tests.statistics.bounds import Bounds, geometric_bounds, median_bounds, t_bounds
from tests.statistics.draws import LAWS, NS, TRIALS, Numbers, chance, law, pairs, quotients, record

TABLES = {
    "median": """
                        2     3     5     6     7    10    20
        normal       95.1  95.1  94.9  96.9  98.3  98.0  95.9
        log-normal   95.1  94.9  95.0  96.7  98.5  97.9  96.0
        log-heavy    95.8  96.2  96.3  96.8  98.4  97.8  95.9
        exponential  95.0  94.8  95.2  96.9  98.4  97.9  96.0
        slowed       92.6  95.7  96.5  97.0  98.4  97.9  95.9
        ticks        87.6  96.5  96.2  99.9  99.9  99.9 100.0
    """,
    "mean": """
                        2     3     5     6     7    10    20
        normal       95.1  95.1  94.9  94.9  95.0  95.0  95.1
        log-normal   94.0  92.2  91.6  91.8  91.8  92.2  93.1
        heavy        95.6  96.3  96.5  96.3  96.0  95.7  95.5
        exponential  91.0  88.3  88.0  88.4  89.1  90.1  91.8
        slowed       69.3  49.5  66.5  73.5  78.5  88.6  92.2
        ticks        87.6  96.5  96.3  94.6  94.1  95.3  94.6
        rare         18.1  26.8  40.6  46.5  52.3  64.8  87.3
    """,
    "geometric": """
                        2     3     5     6     7    10    20
        log-normal   95.1  94.9  95.0  94.8  95.2  94.8  95.2
        log-heavy    95.8  96.2  96.3  96.2  96.0  95.9  96.0
        exponential  94.6  93.8  93.3  93.0  93.0  93.6  94.0
        slowed       73.8  52.4  66.5  73.5  78.5  88.6  92.3
    """,
    "difference": """
                        2     3     5     6     7    10    20
        normal       95.1  95.2  94.9  94.9  95.2  94.9  95.0
        log-normal   95.4  95.9  95.9  95.9  95.9  95.4  95.1
        heavy        95.7  96.1  95.9  95.8  95.7  95.5  95.5
        exponential  95.9  96.8  96.7  96.5  96.2  95.7  95.4
        slowed       93.3  97.7  98.8  98.4  97.9  96.4  95.0
        ticks        87.9  95.9  95.4  94.6  94.5  95.1  95.1
        rare         98.5  99.9 100.0  99.9  99.8  99.0  96.0
    """,
    "ratio": """
                        2     3     5     6     7    10    20
        log-normal   94.9  94.8  95.0  95.1  95.1  94.8  94.9
        log-heavy    95.6  95.8  95.9  96.0  95.9  95.6  95.5
        exponential  95.5  95.6  95.5  95.7  95.4  95.4  95.1
        slowed       93.3  97.7  98.6  98.2  97.8  96.4  95.0
    """,
}
SHORT = {
    ("median", "slowed"): "two logarithms out of two heaps scatter like no t; three make up for it",
    ("median", "ticks"): "two equal readings of a coarse clock claim to know the value",
    ("mean", "log-normal"): "skewed: the few large values that lift the mean are missing from most samples",
    ("mean", "exponential"): "skewed, as above",
    ("mean", "slowed"): "most small samples hold no slowed run or nothing else, and claim to know the mean",
    ("mean", "ticks"): "two equal readings of a coarse clock claim to know the value",
    (
        "mean",
        "rare",
    ): "an event that no replicate has seen gets [0, 0], where n zeros bound its share by about 3 / n",
    ("geometric", "exponential"): "skewed the other way on logarithms",
    ("geometric", "slowed"): "as the mean",
    ("difference", "slowed"): "two pairs often differ by the same slow run; three make up for it",
    ("difference", "ticks"): "two equal differences of a coarse clock claim to know the mean",
    ("ratio", "slowed"): "as the difference",
}


def simulated(kind: str, name: str, n: int) -> tuple[Bounds, float]:
    """The bounds of every trial, and the truth."""
    match kind:
        case "median":
            return median_bounds(law(name, n)), LAWS[name].median
        case "mean":
            return t_bounds(law(name, n)), LAWS[name].mean
        case "geometric":
            return geometric_bounds(law(name, n)), LAWS[name].geometric
        case "difference":
            arm, baseline = pairs(name, n)
            return t_bounds(arm - baseline), 0.0
        case _:
            arm, baseline = quotients(name, n)
            return geometric_bounds(arm / baseline), 1.0


def coverage(kind: str, name: str, n: int) -> float:
    """The share of trials whose interval holds the truth."""
    (low, high), truth = simulated(kind, name, n)
    rounding = 1e-12  # samples that are all equal have an interval without width, a rounding error beside the truth
    return float(np.mean((low <= truth + rounding) & (truth - rounding <= high)))


def ours(kind: str, name: str, n: int, trial: int) -> tuple[float | None, float | None]:
    """What the project itself says of one trial."""
    if kind == "median":
        return of_median(law(name, n)[trial].tolist()) or (None, None)
    if kind in ("mean", "geometric"):
        values = law(name, n)[trial].tolist()
        found = mean_of(values, geometric=kind == "geometric")
        return found.low, found.high
    both = pairs(name, n) if kind == "difference" else quotients(name, n)
    rows = [
        record(float(value), arm=arm, seed=seed)
        for arm, values in zip("ab", both, strict=True)
        for seed, value in enumerate(values[trial])
    ]
    found = compare(rows, arm="a", baseline="b", metric="loss_gap", ratio=kind == "ratio")
    return found.low, found.high


def tables() -> Mapping[tuple[str, str], tuple[float, ...]]:
    """The shares that the tables state, by interval and law."""
    rows = {}
    for kind, table in TABLES.items():
        head, *body = table.strip().splitlines()
        assert tuple(map(int, head.split())) == NS, "a column for each sample size"
        for line in body:
            name, *cells = line.split()
            rows[kind, name] = tuple(float(cell) / 100 for cell in cells)
    return rows


ROWS = tables()


@pytest.mark.parametrize("kind, name", ROWS)
def test_an_interval_holds_the_truth_as_often_as_the_table_says(kind: str, name: str) -> None:
    measured = [coverage(kind, name, n) for n in NS]
    print(f"{kind:12}{name:12}" + "".join(f"{100 * share:6.1f}" for share in measured))
    for share, stated in zip(measured, ROWS[kind, name], strict=True):
        assert abs(share - stated) <= math.sqrt(2) * chance(stated, TRIALS) + 0.0005  # both were drawn; half a digit


@pytest.mark.parametrize("kind, name", ROWS)
def test_an_interval_that_holds_the_truth_less_often_than_it_says_has_its_reason(kind: str, name: str) -> None:
    least = 0.95 - chance(0.95, TRIALS)
    assert any(share < least for share in ROWS[kind, name]) == ((kind, name) in SHORT)


@pytest.mark.parametrize("kind, name", ROWS)
@pytest.mark.parametrize("n", NS)
def test_what_is_simulated_is_what_the_project_computes(kind: str, name: str, n: int) -> None:
    (low, high), _ = simulated(kind, name, n)
    for trial in range(4):
        expected = pytest.approx((low[trial], high[trial]), rel=1e-9, abs=1e-12)
        assert ours(kind, name, n, trial) == expected


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_interval_of_a_median_is_the_narrowest_of_order_statistics_that_holds_its_level(level: float) -> None:
    def outside(rank: float, n: int) -> float:  # twice the chance that fewer than `rank` of n lie below the median
        return 2 * sum(math.comb(n, below) for below in range(int(rank))) / 2**n

    exists = [n for n in range(2, 60) if outside(1, n) <= 1 - level]
    assert exists[0] == {0.9: 5, 0.95: 6, 0.99: 8}[level]
    for n in exists:
        low, high = of_median([float(rank) for rank in range(1, n + 1)], level=level) or (0.0, 0.0)
        assert low + high == n + 1  # as far from either end
        assert outside(low, n) <= 1 - level < outside(low + 1, n)


def near(truth: float, values: Numbers) -> bool:
    """Whether the mean of the values is within 5 standard errors; a truth that a law does not have is near anything."""
    return math.isnan(truth) or abs(float(values.mean()) - truth) < 5 * float(values.std()) / math.sqrt(values.size)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_has_the_truth_that_it_states(name: str) -> None:
    stated, samples = LAWS[name], law(name, 100)
    assert near(stated.mean, samples)
    assert math.isnan(stated.geometric) or near(math.log(stated.geometric), np.log(samples))
    sides = 0.5 * (samples < stated.median) + 0.5 * (samples <= stated.median)  # equal ones count half
    assert math.isnan(stated.median) or near(0.5, sides)


@pytest.mark.parametrize("name", ["log-normal", "exponential", "rare"])
def test_stopping_at_zero_costs_an_interval_no_coverage(name: str) -> None:
    for values in law(name, 3)[:50].tolist():
        rows = [
            record(value, seed=seed, metric="loss", unit="nat/token", noise="absolute")
            for seed, value in enumerate(values)
        ]
        found, free = summarise(rows), mean_of(values)
        assert found.low == max(free.low or 0.0, 0.0)
        assert (found.value, found.high) == (free.value, free.high)
