"""A figure's twin: the numbers that it shows, whole, as tables for readers who cannot see it or want to compute.

A figure that a study declares is drawn from points, and so is its twin. Of one that draws itself the twin is read back
from the picture: each line with a label by its data, row by row where rows have names, each labelled bar by where it
starts and ends, each labelled mesh by its cells. What has no label is decoration.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ablations.study import Figure
from ablations.traced import Prose, mark
from bench.metrics import metric
from reports.frame import axes_of
from reports.numbers import place, with_unit
from reports.tables import MISSING, Table


def of_points(figure: Figure, points: pd.DataFrame) -> list[Table]:
    """The twin of a declared figure: places down and arms across for a line, else a row per point."""
    unit = metric(figure.metric).unit
    shown = f"{'change in ' if figure.against_baseline else ''}{figure.metric}{f' ({unit})' if unit else ''}"
    if figure.kind == "line":
        across = str(figure.x)
        arms = tuple(dict.fromkeys(points["arm"]))
        cells = {(row[across], row["arm"]): _with_interval(row) for _, row in points.iterrows()}
        places = dict.fromkeys(points[across])
        rows = [(place(at), *(cells.get((at, arm), MISSING) for arm in arms)) for at in places]
        return [_table(figure.caption, f"{shown} [95% interval]", (with_unit(across), *arms), rows)]
    varying = [axis for axis in axes_of(points) if points[axis].nunique(dropna=False) > 1]
    rows = [
        (
            str(row["arm"]),
            *(MISSING if pd.isna(row[axis]) else place(row[axis]) for axis in varying),
            *(_cell(row[end], row["records"]) for end in ("value", "low", "high")),
        )
        for _, row in points.iterrows()
    ]
    head = ("arm", *varying, shown, "low", "high")
    return [_table(figure.caption, "low and high: 95% interval", head, rows, texts=1 + len(varying))]


def of_picture(picture: Picture, caption: str) -> list[Table]:
    """The twin of a picture that drew itself: a table of each of its axes' labelled lines, one of its bars, and one of
    each mesh.
    """
    read = (_lines, _bars, _meshes)
    return [table for axes in picture.axes for reader in read for table in reader(axes, caption)]


def _lines(axes: Axes, caption: str) -> list[Table]:
    drawn = [line for line in axes.lines if _labelled(line)]
    across = [line for line in drawn if line.get_transform() != axes.transData]  # axhline spans the axes, not the data
    lines = [line for line in drawn if line not in across]
    if not lines:
        return []
    levels = ", ".join(f"{line.get_label()} {exact(line.get_ydata()[0])}" for line in across)  # type: ignore[index]
    told = f"levels: {levels}" if levels else ""
    title, labels = axes.get_title(loc="left") or axes.get_title() or caption, [str(line.get_label()) for line in lines]
    if names := _words(axes):
        marks = [{_nearest(names, y): x for x, y in line.get_xydata().tolist()} for line in lines]  # type: ignore[union-attr]
        named = [(name, *(exact(line[name]) if name in line else MISSING for line in marks)) for name in names.values()]
        return [_table(title, ", ".join(filter(None, (axes.get_xlabel(), told))), ("row", *labels), named)]
    values = [dict(line.get_xydata().tolist()) for line in lines]  # type: ignore[union-attr]
    places = sorted({at for line in values for at in line})
    rows = [(exact(at), *(exact(line[at]) if at in line else MISSING for line in values)) for at in places]
    note = ", ".join(filter(None, (axes.get_ylabel(), told)))
    return [_table(title, note, (axes.get_xlabel(), *labels), rows)]


def _words(axes: Axes) -> dict[float, str]:
    """What stands at the ticks up the side, where it is words; nothing where it is numbers."""
    ticks = axes.get_yticks()
    labels = axes.yaxis.get_major_formatter().format_ticks(list(ticks))
    words = all(label[:1].isalpha() for label in labels)
    return dict(zip(map(float, ticks), labels, strict=True)) if words else {}


def _nearest(names: dict[float, str], at: float) -> str:
    return names[min(names, key=lambda tick: abs(tick - at))]


def _bars(axes: Axes, caption: str) -> list[Table]:
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle) and _labelled(patch)]
    names, rows = _words(axes), dict[str, list[str]]()
    for bar in sorted(bars, key=lambda bar: (bar.get_y() // 1, bar.get_x(), bar.get_y())):
        start, end = exact(bar.get_x()), exact(bar.get_x() + bar.get_width())
        row = _nearest(names, bar.get_y() + bar.get_height() / 2)
        rows.setdefault(row, []).append(f"{bar.get_label()} ({start} to {end})")
    told = [(name, ", ".join(said)) for name, said in rows.items()]
    title = axes.get_title(loc="left") or axes.get_title() or caption
    return [_table(title, "each bar with its start and end", ("row", "bars"), told, texts=2)] if rows else []


def _meshes(axes: Axes, caption: str) -> list[Table]:
    tables = []
    for mesh in axes.collections:
        if isinstance(mesh, QuadMesh) and _labelled(mesh):
            corners = np.asarray(mesh.get_coordinates())
            across = (corners[0, :-1, 0] + corners[0, 1:, 0]) / 2
            cells = np.asarray(mesh.get_array()).reshape(corners.shape[0] - 1, -1)
            rows = [(str(place), *map(exact, row)) for place, row in enumerate(cells.tolist(), start=1)][::-1]
            head = ("row", *(f"{axes.get_xlabel()} {exact(at)}" for at in across))
            title = axes.get_title(loc="left") or axes.get_title() or caption
            tables.append(_table(title, str(mesh.get_label()), head, rows))
    return tables


def exact(value: Any) -> str:
    """A number as it is drawn, to six figures that matter; whole numbers whole."""
    number = float(value)
    if number.is_integer() or abs(number) >= 1e6:
        return f"{number:.0f}"
    return f"{number:.6g}"


def _cell(value: float, records: Sequence[str]) -> str:
    return MISSING if pd.isna(value) else Prose.of(mark(exact(value), records))


def _with_interval(row: Any) -> Prose:
    known = pd.notna(row["low"]) and row["low"] != row["high"]
    ends = f" [{exact(row['low'])}, {exact(row['high'])}]" if known else ""
    return Prose.of(mark(exact(row["value"]) + ends, row["records"]))


def _labelled(artist: Line2D | Rectangle | QuadMesh) -> bool:
    return not str(artist.get_label()).startswith("_") and str(artist.get_label()) != ""


def _table(caption: str, note: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]], texts: int = 1) -> Table:
    return Table(caption=caption, note=note, head=head, rows=tuple(rows), texts=texts)
