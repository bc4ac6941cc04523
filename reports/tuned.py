"""Which value of its grid each arm of a tuned study chose, and how often that was the first or the last of them.

Where the best value lies at the edge of a grid the optimum may lie beyond it, and the arm was not given its due. The
grid is read from what `ablations.tuning.readings` leaves in the records: of every arm and seed the loss on the
validation text at each value of the field, an error where a value diverged.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ablations.traced import Prose, mark
from bench.record import Record
from reports.numbers import place
from reports.tables import MISSING, Table, title

Value = str | int | float


def chosen(records: Sequence[Record]) -> list[Table]:
    """A table of every tuned metric; none where nothing was tuned."""
    tuning = [row for row in records if row.axes.get("text") == "validation"]
    tables = []
    for metric in dict.fromkeys(row.metric for row in tuning):
        here = [row for row in tuning if row.metric == metric]
        tested = [row for row in records if row.metric == metric and row.axes.get("text") == "test"]
        fields = sorted(_axes(here) - _axes(tested))
        if tested and len(fields) == 1:
            tables.append(_table(metric, fields[0], here))
    return tables


def _axes(records: Iterable[Record]) -> set[str]:
    return {name for row in records for name in row.axes}


def _table(metric: str, field: str, records: Sequence[Record]) -> Table:
    values = sorted({row.axes[field] for row in records if field in row.axes}, key=_order)
    by_arm: dict[str, dict[Any, list[Record]]] = {}
    for row in records:
        if field in row.axes and row.error is None:
            where = (row.seed, *sorted((name, value) for name, value in row.axes.items() if name != field))
            by_arm.setdefault(row.arm, {}).setdefault(where, []).append(row)
    rows = tuple((arm, *_told(field, values, list(seeds.values()))) for arm, seeds in by_arm.items())
    grid = ", ".join(map(place, values))
    note = f"of {grid}: that with the lowest {title(metric)} of validation text; at an edge the optimum may lie beyond"
    head = ("arm", "chosen (by how many seeds)", "at an edge")
    return Table(caption=f"What each arm's tuning chose: {field}", note=note, head=head, rows=rows, texts=2)


def _told(field: str, values: Sequence[Value], seeds: Sequence[Sequence[Record]]) -> tuple[Prose, Prose]:
    best = [min(rows, key=lambda row: row.value or 0.0).axes[field] for rows in seeds]
    edge = sum(value in (values[0], values[-1]) for value in best)
    ids = [row.id for rows in seeds for row in rows]
    counts = sorted(Counter(best).items(), key=lambda pair: _order(pair[0]))
    told = ", ".join(f"{place(value)} ({count})" for value, count in counts)
    numbers = all(isinstance(value, int | float) for value in values)
    return Prose.of(mark(told, ids)), Prose.of(mark(f"{edge} of {len(best)}" if numbers else MISSING, ids))


def _order(value: Value) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    return (True, 0.0, value) if isinstance(value, str) else (False, float(value), "")
