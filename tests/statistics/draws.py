"""Data of known truth for simulations: laws of figures with their mean and median, seeded, many trials at once.

normal        a tenth of the mean as spread
log-normal    what many small factors make
heavy         Student's t with 3 degrees of freedom: a wild value now and then
log-heavy     the same on the logarithms
exponential   skewed: the mean is far from the median
slowed        one sample in five takes half as long again, as when a neighbour wakes up
ticks         normal, read on a clock of ten ticks: many equal values
rare          a share that is 0 in nine of ten replicates and 1 in the tenth
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.record import Record

Numbers = NDArray[np.float64]
NS = (2, 3, 5, 6, 7, 10, 20)
TRIALS = 20_000


@dataclass(frozen=True)
class Law:
    """How to draw, and what the truth is: the mean, the median, and exp(mean of the logarithms); NaN where none is."""

    draw: Callable[[np.random.Generator, tuple[int, ...]], Numbers]
    mean: float = math.nan
    median: float = math.nan
    geometric: float = math.nan


def _slowed(random: np.random.Generator, shape: tuple[int, ...]) -> Numbers:
    slow: Numbers = np.where(random.random(shape) < 0.2, 1.5, 1.0)
    return slow * np.exp(0.02 * random.standard_normal(shape))


# The median of `slowed`: 0.8 Phi(log(m) / 0.02) + 0.2 Phi(log(m / 1.5) / 0.02) = 0.5, the second term being 0.
_SLOWED_MEDIAN = math.exp(0.02 * 0.3186393639643752)

LAWS: Mapping[str, Law] = {
    "normal": Law(lambda r, shape: 1 + 0.1 * r.standard_normal(shape), mean=1, median=1),
    "log-normal": Law(
        lambda r, shape: np.exp(0.5 * r.standard_normal(shape)), mean=math.exp(0.125), median=1, geometric=1
    ),
    "heavy": Law(lambda r, shape: 1 + 0.1 * r.standard_t(3, shape), mean=1),
    "log-heavy": Law(lambda r, shape: np.exp(0.1 * r.standard_t(3, shape)), median=1, geometric=1),
    "exponential": Law(
        lambda r, shape: r.exponential(size=shape), mean=1, median=math.log(2), geometric=math.exp(-np.euler_gamma)
    ),
    "slowed": Law(_slowed, mean=1.1 * math.exp(0.0002), median=_SLOWED_MEDIAN, geometric=math.exp(0.2 * math.log(1.5))),
    "ticks": Law(lambda r, shape: np.round(1 + 0.1 * r.standard_normal(shape), 1), mean=1, median=1),
    "rare": Law(lambda r, shape: (r.random(shape) < 0.1).astype(float), mean=0.1),
}


def law(name: str, n: int, trials: int = TRIALS) -> Numbers:
    """`trials` rows of `n` samples, the same on every call."""
    random = np.random.default_rng([n, trials, *name.encode()])
    return LAWS[name].draw(random, (trials, n))


def pairs(name: str, n: int) -> tuple[Numbers, Numbers]:
    """An arm and its baseline, both of that law around the luck of their seed, which is larger than the noise."""
    luck = np.exp(np.random.default_rng(n).standard_normal((TRIALS, n)))
    arm, baseline = np.hsplit(law(name, 2 * n), 2)
    return luck + arm, luck + baseline


def quotients(name: str, n: int) -> tuple[Numbers, Numbers]:
    """The same with luck as a factor."""
    luck = np.exp(np.random.default_rng(n).standard_normal((TRIALS, n)))
    arm, baseline = np.hsplit(law(name, 2 * n), 2)
    return luck * arm, luck * baseline


def chance(share: float, trials: int) -> float:
    """What Monte Carlo may be off: 4 standard errors of a share, which one comparison in 16,000 exceeds by chance."""
    return 4 * math.sqrt(max(share * (1 - share), 1 / trials) / trials)


def record(value: float | None, **more: object) -> Record:
    """A record of a noisy figure that may be negative, with whatever else the test says of it."""
    known: dict[str, object] = {"study": "s", "arm": "a", "metric": "loss_gap", "unit": "nat/token", "noise": "paired"}
    known |= {"machine": "m", "revision": "r", "profile": "full", "time": "t", "seed": 0, "n": 1, "value": value}
    return Record(**known | more)  # type: ignore[arg-type]
