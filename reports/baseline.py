"""Tables of a study that set every arm against its baseline: what it changes, and whether what it did differs."""

from collections.abc import Sequence

from ablations.comparison import Comparison, Family, families
from ablations.difference import Difference, Quantity, differences
from ablations.significance import ALPHA, POWER
from ablations.study import Study
from ablations.traced import Prose, mark
from ablations.verdicts import current
from bench.metrics import metric
from bench.record import Record
from reports.numbers import interval, number, place
from reports.tables import MISSING, Table, title


def against_baseline(study: Study, records: Sequence[Record]) -> list[Table]:
    """What each arm changes, where configs define arms; then a table of tests for every metric that the study compares.

    `records` are those that stand; only those under the rule of verdict as it stands now are tested.
    """
    found = differences(study)
    changes = [_changes(study.baseline, found)] if any(row.configured for row in found) else []
    arms = [arm.name for arm in study.arms]
    return changes + [
        _tests(family, study.baseline)
        for family in families(current(study, records), study.compared, arms, study.baseline)
    ]


def _changes(baseline: str, found: tuple[Difference, ...]) -> Table:
    rows = tuple((row.arm, _changed(row), ", ".join(map(_ratio, row.unmatched)) or MISSING) for row in found)
    return Table(
        caption=f"What each arm changes against {baseline}",
        note="by the configs of the full profile; not matched: off by more than 1%",
        head=("arm", "field: old -> new", "not matched"),
        rows=rows,
        texts=3,
    )


def _changed(row: Difference) -> str:
    if not row.configured:
        return f"no config: {row.words}"
    return "; ".join(map(str, row.changes)) or "nothing in the config"


def _ratio(quantity: Quantity) -> str:
    old, new = (number(value, quantity.unit) for value in (quantity.old, quantity.new))
    return f"{quantity.name} {quantity.ratio:.3g}x ({old} -> {new})"


def _tests(family: Family, baseline: str) -> Table:
    declared = family.compared
    where = ", ".join(f"{name} {place(value)}" for name, value in family.axes.items())
    return Table(
        caption=f"{title(declared.metric)} minus {baseline}'s, by seed ({where})",
        note=_method(family),
        head=("arm", "difference [95%, t]", "[95%, exact]", "p exact", "p Holm", "p TOST", "detectable", "verdict"),
        rows=tuple(_tested(row, metric(declared.metric).unit) for row in family.rows),
    )


def _tested(row: Comparison, unit: str) -> tuple[str, ...]:
    found = row.difference
    low, high = (float("nan") if end is None else end for end in (found.low, found.high))
    exact = MISSING if row.interval is None else f"[{number(row.interval[0], unit)}, {number(row.interval[1], unit)}]"
    chances = (MISSING if p is None else f"{p:.2g}" for p in (row.flipped, row.adjusted, row.equivalent))
    seen = MISSING if row.detectable is None else number(row.detectable, unit)
    counted = f"{interval(found.value, low, high, unit)} (n={found.n})"
    return row.arm, *(Prose.of(mark(text, row.records)) for text in (counted, exact, *chances, seen)), row.verdict


def _method(family: Family) -> str:
    declared, m = family.compared, len(family.rows)
    test = (
        "the exact sign-flip test's"
        if family.exact
        else f"the paired t test's, as the sign-flip test of {m} arms finds nothing below {family.needed} seeds"
    )
    return (
        f"p Holm: {test}, for a family of {m}; p TOST: that the difference is beyond +-{declared.margin:g} "
        f"({declared.why}), likewise; detectable: with power {POWER:g} at {ALPHA:g}/{m}"
    )
