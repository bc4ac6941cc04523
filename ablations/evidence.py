"""From records to an estimate with an interval, and from an estimate to a verdict.

A replicate is one seed (of a timing: one fresh process). Over n replicates the estimate is their mean with a 95% t
interval, which holds up at few replicates where a bootstrap does not; paired ratios are averaged as logarithms, so that
r and 1/r are each other's mirror. An exact metric that is equal in all replicates has the interval [v, v]. A claim is a
region of values: an estimate whose whole interval lies inside holds, one whose whole interval lies outside does not,
and one across the border decides nothing.

The exact sign-flip test, scipy's, assumes only that an effect's sign is arbitrary when there is none: with n pairs its
least p is 2 / 2^n, hence 6 pairs for one comparison at 0.05, and 1 + log2(m / 0.05) for m of them under Holm.

Of traced records (`ablations.traced`) every estimate knows the records that it comes from.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ablations.claims import Outcome, Verdict
from ablations.traced import Sources, Traced, carry, claim_reads, mark, note_read, sources_of
from bench.metrics import metric as metric_named
from bench.record import Record
from dsv3.config.rules import require

Value = str | int | float


class NoEvidence(LookupError):
    """The records that a rule asks for are not there (yet)."""


@dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval (None with a single noisy replicate) and the replicates behind it."""

    value: float
    low: float | None
    high: float | None
    n: int

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The estimate of a monotone function of the value: `saved = ratio.map(lambda r: 1 - r)`."""
        sources = sources_of(self.value)
        if self.low is None or self.high is None:
            return Estimate(function(self.value), None, None, self.n).traced(sources)
        low, high = sorted((function(self.low), function(self.high)))
        return Estimate(function(self.value), low, high, self.n).traced(sources)

    def traced(self, sources: Sources) -> "Estimate":
        """The same estimate, known to come from these sources too."""
        if not sources:
            return self
        return Estimate(*(carry(part, sources) for part in (self.value, self.low, self.high, self.n)))

    def __str__(self) -> str:
        return mark(self._text(float(self.value)), sources_of(self.value))

    def _text(self, value: float) -> str:
        if self.low is None or self.high is None:
            return f"{value:.3g} (n={int(self.n)}, no interval)"
        if self.low == self.high:
            return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
        return f"{value:.3g} [{float(self.low):.3g}, {float(self.high):.3g}]"


def estimate(records: Sequence[Record], *, arm: str, metric: str, **where: Value) -> Estimate:
    """The mean over replicates of one arm's metric at the point that `where` selects.

    Raises:
        NoEvidence: no record of that arm and metric at that point.
        ValueError: the axes in `where` leave more than one point.
    """
    rows = _point(records, arm, metric, where)
    return summarise(list(rows.values()))


def compare(
    records: Sequence[Record], *, arm: str, baseline: str, metric: str, ratio: bool = False, **where: Value
) -> Estimate:
    """The paired difference (or ratio) of an arm's metric from the baseline's, over the seeds that both have on equal
    texts.

    Raises:
        NoEvidence: no seed has both, or the baseline of a ratio is 0.
        ValueError: the axes in `where` leave more than one point.
    """
    ours, theirs = (_point(records, name, metric, where) for name in (arm, baseline))
    both = matched(ours, theirs)
    if not both:
        apart = ", of one corpus" if ours.keys() & theirs.keys() else ""
        raise NoEvidence(f"no seed has {metric} of both {arm} and {baseline}{apart}{_at(where)}")
    pairs = [(_value(mine), _value(other)) for mine, other in both]
    exact = all(mine.noise == other.noise == "exact" for mine, other in both)
    if ratio:
        if not all(b for _, b in pairs):
            raise NoEvidence(f"{metric} of {baseline} is 0{_at(where)}: nothing has a ratio to it")
        return mean([a / b for a, b in pairs], exact=exact, geometric=True)
    return mean([a - b for a, b in pairs], exact=exact)


def matched(
    ours: Mapping[int | None, Record], theirs: Mapping[int | None, Record]
) -> tuple[tuple[Record, Record], ...]:
    """The two records of every seed that both have, unless they read unequal texts: such two differ in more than the
    arm.
    """
    both = ((row, theirs[seed]) for seed, row in ours.items() if seed in theirs)
    return tuple((mine, other) for mine, other in both if mine.corpus == other.corpus)


def replicates(records: Sequence[Record], *, arm: str, metric: str, **where: Value) -> dict[int | None, Record]:
    """The records of one point by seed.

    Raises:
        NoEvidence: there is none.
        ValueError: the axes in `where` leave more than one point.
    """
    rows = _point(records, arm, metric, where)
    note_read(rows.values())
    return rows


def _point(records: Sequence[Record], arm: str, metric: str, where: Mapping[str, Value]) -> dict[int | None, Record]:
    rows = [row for row in records if row.error is None and (row.arm, row.metric) == (arm, metric)]
    rows = [row for row in rows if all(row.axes.get(name) == value for name, value in where.items())]
    if not rows:
        raise NoEvidence(f"no record of {metric} of {arm}{_at(where)}")
    points = {tuple(sorted(row.axes.items(), key=str)) for row in rows}
    if len(points) > 1:
        names = sorted(
            {name for point in points for name, value in point if not all((name, value) in p for p in points)}
        )
        raise ValueError(f"{metric} of {arm}{_at(where)}: several points are left; also say {', '.join(names)}")
    return {row.seed: row for row in rows}


def summarise(rows: Sequence[Record]) -> Estimate:
    """The mean over replicates of one point, with the interval its noise class allows; not below 0 where nothing is,
    nor above the whole of a share.
    """
    if len(rows) == 1 and rows[0].noise != "exact":
        low, high = rows[0].interval or (None, None)
        # Blocks of one process share its luck in memory layout: they are not replicates.
        n = rows[0].n if rows[0].over in ("processes", "seeds") else 1
        return Estimate(_value(rows[0]), low, high, n).traced(sources_of(rows[0].value))
    exact = all(row.noise == "exact" for row in rows)
    ratios = all(row.noise == "paired" and row.unit == "ratio" for row in rows)
    found = mean([_value(row) for row in rows], exact=exact, geometric=ratios)
    if found.low is None or found.high is None:
        return found
    known = metric_named(rows[0].metric)
    low = found.low if known.signed else max(found.low, 0.0)
    high = min(found.high, 1.0) if known.unit == "share" and not known.beyond else found.high
    return replace(found, low=low, high=high).traced(sources_of(found.value))


def mean(values: Sequence[float], *, exact: bool = False, geometric: bool = False) -> Estimate:
    """The mean with its 95% t interval, of the logarithms where `geometric`; equal exact values have the interval [v,
    v].
    """
    return _mean([float(value) for value in values], exact, geometric).traced(sources_of(*values) or claim_reads())


def _mean(values: Sequence[float], exact: bool, geometric: bool) -> Estimate:
    n = len(values)
    if exact and len(set(values)) == 1:
        return Estimate(values[0], values[0], values[0], n)
    if geometric and min(values) > 0:
        return _mean([math.log(value) for value in values], exact=False, geometric=False).map(_exp)
    if n == 1:
        return Estimate(values[0], None, None, 1)
    from scipy.special import stdtrit

    middle = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1) / n)
    half = float(stdtrit(n - 1, 0.975)) * spread
    return Estimate(middle, middle - half, middle + half, n)


def exponent(points: Mapping[int, Mapping[int | None, Record]]) -> Estimate:
    """With which power of x a value grows: the slope of its logarithm by least squares, in each seed that has every x,
    and the mean over seeds. `points` has the replicates by x.

    Raises:
        NoEvidence: fewer than two points, or no seed has all of them.
    """
    import numpy as np

    seeds = set.intersection(*(set(rows) for rows in points.values())) if len(points) > 1 else set()
    if not seeds:
        raise NoEvidence(f"a slope needs one seed at two points: there are {len(points)} points")
    x = np.log([float(at) for at in points])
    slopes = [
        float(np.polyfit(x, np.log([float(_value(rows[seed])) for rows in points.values()]), 1)[0])
        for seed in sorted(seeds, key=str)
    ]
    sources = sources_of(*(_value(rows[seed]) for rows in points.values() for seed in seeds))
    return mean(slopes).traced(sources)


def decide(found: Estimate, answer: str, *, at_least: float = -math.inf, at_most: float = math.inf) -> Verdict:
    """Whether the whole interval lies in [at_least, at_most] (holds), outside it (does not), or across a border (not
    decidable here).

    `answer` is the sentence that the page prints: write the estimate into it, `f"saves {found} of the bytes"`.
    """
    assert at_least <= at_most, f"the region [{at_least}, {at_most}] is empty"
    low, high = found.low, found.high
    if low is None or high is None:
        outcome = Outcome.UNDECIDABLE
    elif at_least <= low and high <= at_most:
        outcome = Outcome.HOLDS
    elif high < at_least or at_most < low:
        outcome = Outcome.FAILS
    else:
        outcome = Outcome.UNDECIDABLE
    return Verdict(outcome=outcome, answer=answer, value=found.value, low=low, high=high, n=found.n)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the exact sign-flip test that paired differences are symmetric around zero.

    Raises:
        ValueError: no difference, or one that is no finite number.
    """
    import numpy as np

    fine = len(differences) > 0 and all(map(math.isfinite, differences))
    require(fine, "differences", list(differences), "must be finite numbers", "look at the records")
    values = np.asarray(differences, dtype=float)
    sums = np.zeros(1)  # of every way to sign them, the observed one first, the largest difference being 1
    for value in values / (np.abs(values).max() or 1.0):
        sums = np.concatenate((sums + value, sums - value))
    # Sums of n numbers up to 1 that differ by rounding alone are ties, and rounding is below n^2 eps. scipy's tolerance
    # is relative to the observed sum: where large differences cancel, it misses them.
    observed, slack = sums[0], 1e-12 * len(values)
    beyond = min((sums >= observed - slack).sum(), (sums <= observed + slack).sum())
    return min(1.0, 2.0 * float(beyond) / len(sums))


def seeds_needed(comparisons: int = 1, alpha: float = 0.05) -> int:
    """The fewest pairs with which the sign-flip test under Holm can find anything: 1 + log2(m / alpha), rounded up."""
    return 1 + math.ceil(math.log2(comparisons / alpha))


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf  # where doubles end: two wild replicates bound nothing


def _value(row: Record) -> float:
    assert row.value is not None, f"a record without error has a value: {row!r}"
    return row.value if isinstance(row.value, Traced) else float(row.value)


def _at(where: Mapping[str, Value]) -> str:
    return "".join(f", {name}={value}" for name, value in where.items())
