"""Tables of what was found: arms one way, places on the axes the other, a value with its interval in each cell.

Metrics with a single point per arm, at the same place, share one table, arms down and metrics across. A table says
once what stands behind all of its cells ("6 seeds"); a cell that differs says so itself. An axis with one value is
told in the note.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ablations.traced import Prose, mark
from bench.metrics import metric
from bench.record import Record
from reports.frame import axes_of, summary
from reports.numbers import interval, place, spelt, with_unit

MISSING = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text; `note` says what stands behind its cells, the first `texts` columns are words.

    A cell that is `Prose` knows its records, and so does its place in the page.
    """

    caption: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1


def results(records: Sequence[Record], metrics: Sequence[str], arms: Sequence[str]) -> list[Table]:
    """Every measured point of the metrics, in their order."""
    points = summary(records)
    found = {name: _with_own_axes(points[points["metric"] == name]) for name in metrics}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, rows in found.items():
        if not rows.empty:
            alone = all(rows[axis].nunique(dropna=False) == 1 for axis in axes_of(rows))
            groups.setdefault((_fixed(rows),) if alone else (name, "apart"), []).append(name)
    return [
        _by_place(found[names[0]], names[0], arms)
        if "apart" in key
        else _by_arm([found[n] for n in names], names, arms)
        for key, names in groups.items()
    ]


def failures(records: Sequence[Record]) -> Table | None:
    """What could not be measured, and why; None when everything could."""
    found: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for record in records:
        if record.error is not None:
            at = " ".join(f"{name}={place(value)}" for name, value in record.axes.items())
            arms, seeds = found.setdefault((at, record.metric, record.error), ([], []))
            arms.append(record.arm)
            seeds.append(MISSING if record.seed is None else str(record.seed))
    rows = tuple(
        (", ".join(dict.fromkeys(arms)), *what, " ".join(dict.fromkeys(seeds))) for what, (arms, seeds) in found.items()
    )
    head = ("arms", "where", "metric", "why", "seeds")
    return Table(caption="", note="", head=head, rows=rows, texts=5) if rows else None


def _with_own_axes(found: pd.DataFrame) -> pd.DataFrame:
    """Without the axes that only other metrics have."""
    return found.drop(columns=[axis for axis in axes_of(found) if found[axis].isna().all()])


def _by_arm(found: Sequence[pd.DataFrame], metrics: Sequence[str], arms: Sequence[str]) -> Table:
    together = pd.concat(list(found))
    common = _common(together)
    cells = {(row["arm"], row["metric"]): _cell(row, common) for _, row in together.iterrows()}
    there = [arm for arm in arms if any((arm, name) in cells for name in metrics)]
    rows = tuple((arm, *(cells.get((arm, name), MISSING) for name in metrics)) for arm in there)
    return Table(caption="By arm", note=_note(together, common), head=("arm", *map(title, metrics)), rows=rows)


def _by_place(found: pd.DataFrame, name: str, arms: Sequence[str]) -> Table:
    values = {axis: found[axis].nunique(dropna=False) for axis in axes_of(found)}
    varying = sorted((axis for axis in values if values[axis] > 1), key=lambda axis: (values[axis], axis))
    there = [arm for arm in arms if arm in set(found["arm"])]
    common = _common(found)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for _, row in found.sort_values(varying, kind="stable", key=_sortable).iterrows():
        at = tuple(MISSING if pd.isna(row[axis]) else place(row[axis]) for axis in varying)
        rows.setdefault(at, {})[row["arm"]] = _cell(row, common)
    caption, note = title(name), _note(found, common)
    if len(rows) < len(there):  # the longer side goes down the page
        head = ("arm", *(", ".join(map(" ".join, zip(varying, at, strict=True))) for at in rows))
        turned = tuple((arm, *(cells.get(arm, MISSING) for cells in rows.values())) for arm in there)
        return Table(caption=caption, note=note, head=head, rows=turned)
    filled = tuple((*at, *(cells.get(arm, MISSING) for arm in there)) for at, cells in rows.items())
    return Table(caption=caption, note=note, head=(*map(with_unit, varying), *there), rows=filled, texts=len(varying))


def title(name: str) -> str:
    """A metric as a heading, with its unit where the numbers do not show it."""
    unit = metric(name).unit
    shown = "" if unit in ("", "ratio", "share", "B", "B/token", "FLOP", "parameters") else f" ({unit})"
    return spelt(name) + shown


def _cell(row: Any, common: str | None) -> str:
    text = mark(interval(row["value"], row["low"], row["high"], metric(row["metric"]).unit), row["records"])
    return Prose.of(text if row["behind"] == common or _exact(row) else f"{text} ({row['behind']})")


def _exact(row: Any) -> bool:
    return bool(metric(row["metric"]).noise == "exact" and row["low"] == row["high"])


def _common(found: pd.DataFrame) -> str | None:
    """What stands behind the most points; None where all are exact and nothing needs saying."""
    noisy = found[[not _exact(row) for _, row in found.iterrows()]]
    return None if noisy.empty else str(noisy["behind"].mode().iloc[0])


def _note(found: pd.DataFrame, common: str | None) -> str:
    """The axes with one value, and what stands behind the cells."""
    told = [f"{axis} {place(value)}" for axis, value in _fixed(found)]
    behind = "exact: equal on every run" if common is None else f"mean [95% interval] over {common}"
    return "; ".join(filter(None, (", ".join(told), behind)))


def _fixed(found: pd.DataFrame) -> tuple[tuple[str, object], ...]:
    """The axes with one value, and which."""
    same = {axis: found[axis].iloc[0] for axis in axes_of(found) if found[axis].nunique(dropna=False) == 1}
    return tuple((axis, value) for axis, value in same.items() if not pd.isna(value))


def _sortable(values: "pd.Series[str]") -> "pd.Series[str]":
    """Numbers by size; text, also where a column holds both, in the order in which it first came."""
    if pd.api.types.is_numeric_dtype(values):
        return values
    return pd.Series(pd.factorize(values)[0], index=values.index)
