"""Every arm of a study against its baseline, or the arm named in its place, on the metrics for which the study declares
what would not matter.

A study says `compared=(Compared("loss", margin=0.01, why="..."),)`. At each point of the axes all arms that it names
form one family: paired differences by seed with a t interval; a test of whether there is a difference, adjusted by Holm
over the family; TOST against the margin, adjusted likewise; and the smallest difference that would have been found.

The family and its number of seeds are those declared, not those that have records, and so is which test decides
(`ablations.significance`). An arm without all declared seeds is shown with its interval and has no verdict; seeds
beyond the declared ones change none.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from ablations.evidence import Estimate, compare, matched, seeds_needed
from ablations.significance import (
    ALPHA,
    MOST,
    Judged,
    equivalence,
    flips_decide,
    holm_adjusted,
    judge_family,
    sign_flip_interval,
)
from bench.metrics import metric as metric_named
from bench.record import Record
from dsv3.config.rules import require

Value = str | int | float


@dataclass(frozen=True)
class Compared:
    """A metric on which arms are compared with the baseline.

    margin    the difference, in the metric's unit, below which two arms count as the same
    why       where the margin comes from: not from these records
    where     axes that select the points
    arms      those that ever have the metric; all but the baseline where none are named
    baseline  the arm that these are compared with; the study's where none is named
    """

    metric: str
    margin: float
    why: str
    where: Mapping[str, Value] = field(default_factory=dict)
    arms: tuple[str, ...] = ()
    baseline: str | None = None

    def __post_init__(self) -> None:
        metric_named(self.metric)
        require(self.margin > 0, "margin", self.margin, "must be above 0", "declare what is too little to matter")
        require(self.why.strip() != "", "why", self.why, "must be text", "say where the margin comes from")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against the baseline, over the seeds that both have.

    seeds         how many are declared
    difference    arm - baseline: mean and 95% t interval; None with no seed
    interval      the exact one, that of the inverted sign-flip test; None with fewer than 6 seeds
    judged        what the family's tests say; None before the last declared seed
    equivalent    p of TOST after Holm, likewise
    records       ids of what was compared, in pairs
    """

    arm: str
    seeds: int
    difference: Estimate | None = None
    interval: tuple[float, float] | None = None
    judged: Judged | None = None
    equivalent: float | None = None
    records: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What the two families of tests say together, at a family-wise error of 5% each."""
        if self.judged is None or self.equivalent is None:
            n = 0 if self.difference is None else self.difference.n
            return f"needs the full profile ({n} of {self.seeds} seeds)"
        match self.judged.adjusted <= ALPHA, self.equivalent <= ALPHA:
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
    """The declared arms at one point of the axes, a row each."""

    compared: Compared
    baseline: str
    arms: tuple[str, ...]
    seeds: int
    axes: Mapping[str, Value]
    rows: tuple[Comparison, ...]

    @property
    def exact(self) -> bool:
        """Whether Holm is over the sign-flip tests, else over paired t tests."""
        return flips_decide(len(self.arms), self.seeds)

    @property
    def needed(self) -> int:
        """The seeds with which the sign-flip test of so many arms can find anything."""
        return seeds_needed(len(self.arms), ALPHA)

    def digest(self) -> str:
        """Twelve hexadecimal digits that name what was declared: equal ones on two pages mean that nothing was moved
        between them.
        """
        told = self.compared
        parts = (told.metric, told.margin, told.why, sorted(told.where.items()), self.baseline, self.arms, self.seeds)
        return sha256(json.dumps(parts).encode()).hexdigest()[:12]


def families(
    records: Sequence[Record], compared: Iterable[Compared], *, arms: Sequence[str], baseline: str, seeds: int
) -> tuple[Family, ...]:
    """The comparisons at every point that the baseline and another arm share, in the order of the records.

    `arms` and `seeds` are those that the study declares, whatever has been measured.
    """
    found = []
    for declared in compared:
        against = declared.baseline or baseline
        others = declared.arms or tuple(arm for arm in arms if arm != against)
        for axes in _points(records, declared, against) if others else ():
            found.append(_family(records, declared, axes, others, against, seeds))
    return tuple(family for family in found if any(row.records for row in family.rows))


def _points(records: Sequence[Record], declared: Compared, baseline: str) -> list[dict[str, Value]]:
    points: dict[tuple[tuple[str, Value], ...], dict[str, Value]] = {}
    for row in records:
        ours = row.error is None and (row.arm, row.metric) == (baseline, declared.metric)
        if ours and declared.where.items() <= row.axes.items():
            points.setdefault(tuple(sorted(row.axes.items())), dict(row.axes))
    return list(points.values())


def _family(
    records: Sequence[Record],
    declared: Compared,
    axes: Mapping[str, Value],
    arms: tuple[str, ...],
    baseline: str,
    seeds: int,
) -> Family:
    there = [row for row in records if row.error is None and row.metric == declared.metric and row.axes == axes]
    paired = {arm: _paired(there, arm, baseline)[:seeds] for arm in arms}
    pairs = {arm: [float(a.value or 0.0) - float(b.value or 0.0) for a, b in found] for arm, found in paired.items()}
    whole = {arm: values for arm, values in pairs.items() if len(values) == seeds}
    judged = judge_family(whole, comparisons=len(arms), seeds=seeds)
    equivalent = holm_adjusted({arm: equivalence(values, declared.margin) for arm, values in whole.items()}, len(arms))
    rows = tuple(
        Comparison(
            arm=arm,
            seeds=seeds,
            difference=_difference(found, arm, baseline, declared.metric),
            interval=sign_flip_interval(pairs[arm]) if 0 < len(found) <= MOST else None,
            judged=judged.get(arm),
            equivalent=equivalent.get(arm),
            records=tuple(row.id for pair in found for row in pair),
        )
        for arm, found in paired.items()
    )
    return Family(compared=declared, baseline=baseline, arms=arms, seeds=seeds, axes=axes, rows=rows)


def _paired(records: Sequence[Record], arm: str, baseline: str) -> list[tuple[Record, Record]]:
    """The arm's record and the baseline's at every seed that has both, in the order of the seeds."""
    ours, theirs = ({row.seed: row for row in records if row.arm == name} for name in (arm, baseline))
    return sorted(matched(ours, theirs), key=lambda pair: pair[0].seed or 0)


def _difference(found: Sequence[tuple[Record, Record]], arm: str, baseline: str, metric: str) -> Estimate | None:
    records = [row for pair in found for row in pair]
    return compare(records, arm=arm, baseline=baseline, metric=metric) if records else None
