"""Tables of a study that set every arm against its baseline: what it changes."""

from ablations.difference import Difference, Quantity, differences
from ablations.study import Study
from reports.numbers import number
from reports.tables import MISSING, Table


def against_baseline(study: Study) -> list[Table]:
    """What each arm changes; nothing where no config defines an arm."""
    found = differences(study)
    return [_changes(study.baseline, found)] if any(row.configured for row in found) else []


def _changes(baseline: str, found: tuple[Difference, ...]) -> Table:
    rows = tuple((row.arm, _factors(row), ", ".join(map(_ratio, row.unmatched)) or MISSING) for row in found)
    return Table(
        caption=f"What each arm changes against {baseline}",
        note="by the configs of the full profile; not matched: off by more than 1%",
        head=("arm", "field: old -> new", "not matched"),
        rows=rows,
        texts=3,
    )


def _factors(row: Difference) -> str:
    if not row.configured:
        return f"no config: {row.words}"
    return "; ".join(map(str, row.factors)) or "nothing in the config"


def _ratio(quantity: Quantity) -> str:
    old, new = (number(value, quantity.unit) for value in (quantity.old, quantity.new))
    return f"{quantity.name} {quantity.ratio:.3g}x ({old} -> {new})"
