"""Every arm of a study against its baseline, on the metrics for which the study declares what would not matter.

A study says `compared=(Compared("loss", margin=0.01, why="..."),)`. At each point of the axes all arms form one family:
paired differences by seed with a t interval; the exact sign-flip test, adjusted by Holm over the family; TOST against
the margin, adjusted likewise; and the smallest difference that would have been found. With so few seeds that the
sign-flip test of so many arms can find nothing (1 + log2(m / alpha) are needed), Holm takes the paired t test, which
assumes normal differences. Which of the two depends on the number of seeds and arms alone, not on what they show.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ablations.evidence import Estimate, compare, seeds_needed, sign_flip
from ablations.significance import (
    ALPHA,
    MOST,
    detectable,
    equivalence,
    holm_adjusted,
    paired_t,
    sign_flip_interval,
)
from bench.metrics import metric as metric_named
from bench.record import Record
from dsv3.config.rules import require

Value = str | int | float


@dataclass(frozen=True)
class Compared:
    """A metric on which all arms are compared with the baseline.

    margin   the difference, in the metric's unit, below which two arms count as the same
    why      where the margin comes from: not from these records
    where    axes that select the points
    """

    metric: str
    margin: float
    why: str
    where: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        metric_named(self.metric)
        require(self.margin > 0, "margin", self.margin, "must be above 0", "declare what is too little to matter")
        require(self.why.strip() != "", "why", self.why, "must be text", "say where the margin comes from")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against the baseline, over the seeds that both have; the p-values are None with a single seed.

    difference    arm - baseline: mean and 95% t interval
    interval      the exact one, that of the inverted sign-flip test; None with fewer than 6 seeds
    flipped       p of the exact sign-flip test
    adjusted      p of the family's test after Holm
    equivalent    p of TOST after Holm
    detectable    smallest difference that a t test at alpha / m finds with 80% power
    records       ids of what was compared, in pairs
    """

    arm: str
    difference: Estimate
    interval: tuple[float, float] | None = None
    flipped: float | None = None
    adjusted: float | None = None
    equivalent: float | None = None
    detectable: float | None = None
    records: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What the two families of tests say together, at a family-wise error of 5% each."""
        if self.adjusted is None or self.equivalent is None:
            return "one seed: no verdict"
        match self.adjusted <= ALPHA, self.equivalent <= ALPHA:
            case True, True:
                return "different, within the margin"
            case True, False:
                return "different"
            case False, True:
                return "same within the margin"
            case _:
                return "not enough evidence"


@dataclass(frozen=True, kw_only=True)
class Family:
    """All arms at one point of the axes; `exact` when Holm is over the sign-flip tests, else over paired t tests."""

    compared: Compared
    axes: Mapping[str, Value]
    exact: bool
    needed: int
    rows: tuple[Comparison, ...]


def families(
    records: Sequence[Record], compared: Iterable[Compared], arms: Sequence[str], baseline: str
) -> tuple[Family, ...]:
    """The comparisons at every point that the baseline and another arm share, in the order of the records."""
    return tuple(
        family
        for declared in compared
        for axes in _points(records, declared, baseline)
        if (family := _family(records, declared, axes, arms, baseline)).rows
    )


def _points(records: Sequence[Record], declared: Compared, baseline: str) -> list[dict[str, Value]]:
    points: dict[tuple[tuple[str, Value], ...], dict[str, Value]] = {}
    for row in records:
        ours = row.error is None and (row.arm, row.metric) == (baseline, declared.metric)
        if ours and declared.where.items() <= row.axes.items():
            points.setdefault(tuple(sorted(row.axes.items())), dict(row.axes))
    return list(points.values())


def _family(
    records: Sequence[Record], declared: Compared, axes: Mapping[str, Value], arms: Sequence[str], baseline: str
) -> Family:
    there = [row for row in records if row.error is None and row.metric == declared.metric and row.axes == axes]
    paired = {arm: found for arm in arms if arm != baseline and (found := _paired(there, arm, baseline))}
    pairs = {arm: [float(a.value or 0.0) - float(b.value or 0.0) for a, b in found] for arm, found in paired.items()}
    needed = seeds_needed(max(1, len(pairs)))
    tested = {arm: values for arm, values in pairs.items() if len(values) > 1}
    exact = all(needed <= len(values) <= MOST for values in tested.values())
    flipped = {arm: sign_flip(values) for arm, values in tested.items() if len(values) <= MOST}
    adjusted = holm_adjusted(flipped if exact else {arm: paired_t(values) for arm, values in tested.items()})
    equivalent = holm_adjusted({arm: equivalence(values, declared.margin) for arm, values in tested.items()})
    rows = tuple(
        Comparison(
            arm=arm,
            difference=compare(there, arm=arm, baseline=baseline, metric=declared.metric),
            interval=sign_flip_interval(values) if len(values) <= MOST else None,
            flipped=flipped.get(arm),
            adjusted=adjusted.get(arm),
            equivalent=equivalent.get(arm),
            detectable=detectable(values, ALPHA / len(pairs)) if arm in tested else None,
            records=tuple(row.id for pair in paired[arm] for row in pair),
        )
        for arm, values in pairs.items()
    )
    return Family(compared=declared, axes=axes, exact=exact, needed=needed, rows=rows)


def _paired(records: Sequence[Record], arm: str, baseline: str) -> list[tuple[Record, Record]]:
    """The arm's record and the baseline's at every seed that has both."""
    ours, theirs = ({row.seed: row for row in records if row.arm == name} for name in (arm, baseline))
    return [(row, theirs[seed]) for seed, row in ours.items() if seed in theirs]
