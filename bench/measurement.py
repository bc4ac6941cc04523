"""From figure to record: Measurement (what came out) + Point (what was asked) + Provenance (where) -> Record.

A meter knows only its figure; the case or the study knows the arm; the run knows the machine. Each says its part once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.fingerprint import Provenance, utc_now
from bench.metrics import metric
from bench.record import Over, Record


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A metric's value, how many samples of what (`over`) stand behind it, and its 95% interval where it has one."""

    metric: str
    value: int | float
    n: int = 1
    over: Over | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        metric(self.metric)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was asked: an arm of a study, against a baseline or alone, at one seed and one place on the axes.

    `config` and `rule` are digests: of the run's config, and of the rule of verdict written before it.
    """

    study: str
    arm: str
    baseline: str | None = None
    seed: int | None = None
    config: str | None = None
    rule: str | None = None
    axes: Mapping[str, str | int | float] = field(default_factory=dict)


def record(point: Point, provenance: Provenance, measurement: Measurement, *, time: str | None = None) -> Record:
    """The record of a figure, of its failure where it is no finite number; `time` is this moment unless given."""
    row = metric(measurement.metric)
    if not math.isfinite(measurement.value):
        why = f"{row.name} is {measurement.value}, which is no finite number"
        return failure(point, provenance, row.name, why, time=time)
    return Record(
        **vars(point), **vars(provenance), **vars(measurement), unit=row.unit, noise=row.noise, time=time or utc_now()
    )


def failure(point: Point, provenance: Provenance, name: str, error: str, *, time: str | None = None) -> Record:
    """The record of a figure of metric `name` that could not be had, and why."""
    row = metric(name)
    return Record(
        **vars(point),
        **vars(provenance),
        metric=name,
        unit=row.unit,
        noise=row.noise,
        value=None,
        n=0,
        error=error,
        time=time or utc_now(),
    )
