"""Figures, drawn from a study's declaration and its records; the same records give the same bytes.

Text in an SVG is text (selectable, searchable), ids are salted with the figure's name, no date is written, and the
metadata says which records, machine and revision the picture shows. A figure without data is drawn as hatched paper
with the reason on it.
"""

import io
import json
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from html import unescape
from typing import Any, Literal

import matplotlib
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from ablations.study import Figure, Study
from bench.metrics import metric
from bench.record import Record
from reports import twins
from reports.frame import axes_of, differences, summary
from reports.numbers import interval, number, place, with_unit
from reports.tables import Table, title

INK = "#1f2328"  # the page swaps it for its own text colour
PAPER = "#ffffff"
CLAIMED = "#d1242f"  # the line of what was claimed
# Okabe and Ito's colours (the blue lighter, for dark pages) are told apart under the common colour deficiencies; the
# baseline is drawn in ink.
COLOURS = ("#1c86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#9aa0a6",
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.prop_cycle": cycler(color=COLOURS),
    "savefig.dpi": 150,
}


class NothingToDraw(LookupError):
    """No record has what the figure shows."""


def styled() -> AbstractContextManager[None]:
    """The look of every figure, while it is drawn."""
    return matplotlib.rc_context(STYLE)


def draw(study: Study, figure: Figure, records: Sequence[Record]) -> tuple[Picture, list[Table]]:
    """The picture of a figure and its twin, the same numbers as tables; where no record has what it shows, a picture
    that says "pending" and why, and no table.
    """
    with styled():
        try:
            if figure.draw is not None:
                picture = _own(study, figure, records)
                return picture, twins.of_picture(picture, figure.caption)
            points = _points(study, figure, records)
            picture = {"line": _line, "interval": _interval}[figure.kind](study, figure, points)
            return picture, twins.of_points(figure, points)
        except KeyError as missing:  # a frame has a column for each axis that some record has
            return pending(figure.caption, f"no record with {missing.args[0]} yet"), []
        except LookupError as missing:
            return pending(figure.caption, str(missing.args[0])), []


def render(picture: Picture, name: str, provenance: dict[str, Any]) -> dict[str, bytes]:
    """The picture as the bytes of an .svg and a .png file, with its provenance in the metadata of both."""
    said = json.dumps(provenance, sort_keys=True)
    # A title in the metadata would become the tooltip of the whole picture.
    metadata: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": "dsv3", "Description": said, "Identifier": name},
        "png": {"Software": "dsv3", "Title": name, "Description": said},
    }
    files = {}
    for kind, fields in metadata.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            picture.savefig(buffer, format=kind, metadata=fields, facecolor=PAPER, bbox_inches="tight", pad_inches=0.1)
        files[kind] = buffer.getvalue()
    return files


def provenance(study: str, figure: str, records: Sequence[Record]) -> dict[str, Any]:
    """What a picture shows: how many records (with a digest of what they say), of which machines, revisions,
    profiles.
    """
    said = "\n".join(sorted(f"{record.id} {record.value} {record.interval} {record.error}" for record in records))
    return {
        "study": study,
        "figure": figure,
        "records": len(records),
        "digest": sha256(said.encode()).hexdigest()[:12],
        "machines": sorted({record.machine for record in records}),
        "revisions": sorted({record.revision for record in records}),
        "profiles": sorted({record.profile for record in records}),
    }


def provenance_in(data: bytes) -> dict[str, Any]:
    """What `render` wrote into the metadata of an .svg or a .png file.

    Raises:
        ValueError: a file that carries no provenance.
    """
    if data.startswith(b"\x89PNG"):
        at, found = 8, b""
        while at < len(data):
            length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
            body, at = data[at + 8 : at + 8 + length], at + length + 12
            found = body.split(b"\0", 1)[1] if kind == b"tEXt" and body.startswith(b"Description\0") else found
        said = found.decode("latin-1")
    else:
        inside = re.search(r"<dc:description>(.*?)</dc:description>", data.decode(), flags=re.DOTALL)
        said = unescape(inside[1]) if inside else ""
    try:
        read: dict[str, Any] = json.loads(said)
    except json.JSONDecodeError as error:
        raise ValueError(f"description={said[:60]!r}: must be the JSON that says what the figure shows") from error
    return read


def pending(caption: str, why: str) -> Picture:
    """Hatched paper that says what is missing: a figure is never invented."""
    with styled():
        picture, axes = _paper(1.5)
        axes.set(xticks=[], yticks=[], title=caption)
        axes.spines[:].set_visible(False)
        axes.patch.set(facecolor="none", edgecolor="#9aa0a6", hatch="//", alpha=0.35)
        said = axes.text(0.5, 0.5, f"pending: {why}", ha="center", va="center", transform=axes.transAxes, wrap=True)
        said.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 4})
        return picture


def _own(study: Study, figure: Figure, records: Sequence[Record]) -> Picture:
    assert figure.draw is not None, "called for figures that draw themselves"
    table = summary(records)
    if figure.against_baseline:
        paired = differences(records, figure.metric, study.baseline)
        table = pd.concat([table, paired.assign(metric=f"change in {figure.metric}")], ignore_index=True)
    picture = figure.draw(table)
    assert isinstance(picture, Picture), (
        f"{figure.name}: draw returned {type(picture).__name__}, not a matplotlib Figure"
    )
    return picture


def _points(study: Study, figure: Figure, records: Sequence[Record]) -> pd.DataFrame:
    """The points that the figure shows, in the order of the arms."""
    if figure.against_baseline:
        table = differences(records, figure.metric, study.baseline)
    else:
        table = summary([record for record in records if record.metric == figure.metric])
    for name, value in figure.where.items():
        table = table[table[name] == value] if name in table else table.iloc[:0]
    if table.empty:
        where = "".join(f", {name}={place(value)}" for name, value in figure.where.items())
        raise NothingToDraw(f"no record of {figure.metric}{where} yet")
    order = {arm.name: at for at, arm in enumerate(study.arms)}
    table = table.sort_values("arm", key=lambda names: names.map(order), kind="stable")
    if figure.kind == "interval":
        return table
    assert figure.x is not None, f"{figure.name}: a line needs the axis x"
    return table.sort_values(figure.x, kind="stable")


def _line(study: Study, figure: Figure, table: pd.DataFrame) -> Picture:
    picture, axes = _paper(3.4)
    there = [arm for arm in study.arms if arm.name in set(table["arm"])]
    for at, arm in enumerate(there):
        points = table[table["arm"] == arm.name]
        middle = points["value"]
        errors = [(middle - points["low"]).fillna(0).clip(lower=0), (points["high"] - middle).fillna(0).clip(lower=0)]
        look = _look(study, arm.name)
        x = _beside(points[figure.x], at - (len(there) - 1) / 2, table[figure.x], log="x" in figure.log)
        axes.errorbar(x, middle, yerr=errors, label=arm.name, capsize=2, zorder=3 + at, **look)
    _scale(axes, figure, table)
    _mark(axes, figure, along="y")
    _keep_in_view(axes, [*table["value"], *([figure.reference[0]] if figure.reference else [])])
    axes.grid(True)
    axes.set(title=figure.caption, xlabel=with_unit(str(figure.x)), ylabel=_label(figure))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=_better(figure), alignment="left")
    return picture


def _interval(study: Study, figure: Figure, table: pd.DataFrame) -> Picture:
    varying = [name for name in axes_of(table) if table[name].nunique(dropna=False) > 1]
    picture, axes = _paper(0.9 + 0.32 * len(table))
    unit = metric(figure.metric).unit
    for at, (_, row) in enumerate(table.iterrows()):
        known = pd.notna(row["low"])
        errors = [[row["value"] - row["low"]], [row["high"] - row["value"]]] if known else None
        look = _look(study, row["arm"]) | {"linestyle": "none"}
        axes.errorbar([row["value"]], [at], xerr=errors, capsize=3, zorder=3, **look)
        said = interval(row["value"], row["low"], row["high"], unit)
        axes.annotate(said, (1.01, at), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    names = [" ".join([row["arm"], *(f"{name}={place(row[name])}" for name in varying)]) for _, row in table.iterrows()]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if "x" in figure.log:
        _log_ticks(axes, "x", table["value"], unit)
    elif unit in ("share", "B"):
        axes.xaxis.set_major_formatter(lambda value, _: number(value, unit))
    axes.grid(True, axis="x")
    _mark(axes, figure, along="x")
    axes.set(title=figure.caption, xlabel=", ".join(filter(None, (_label(figure), _better(figure)))))
    if figure.reference is not None:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.6 / picture.get_figheight()))
    return picture


def _paper(height: float) -> tuple[Picture, Axes]:
    picture = Picture(figsize=(6.0, height))
    return picture, picture.add_subplot()


def _look(study: Study, arm: str) -> dict[str, Any]:
    if arm == study.baseline:
        return {"color": INK, "marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1.2}
    others = [other.name for other in study.arms if other.name != study.baseline]
    at = others.index(arm)
    return {"color": COLOURS[at % 8], "marker": MARKERS[at % 8], "markersize": 4.5, "linestyle": "-", "linewidth": 1.6}


def _label(figure: Figure) -> str:
    return f"{'change in ' if figure.against_baseline else ''}{title(figure.metric)}"


def _better(figure: Figure) -> str:
    better = metric(figure.metric).better
    return "" if better == "none" else f"{better} is better"


def _scale(axes: Axes, figure: Figure, table: pd.DataFrame) -> None:
    unit = metric(figure.metric).unit
    if "x" in figure.log:
        axes.set_xscale("log")
    if "y" in figure.log:
        _log_ticks(axes, "y", table["value"], unit)
    elif unit in ("share", "B"):
        axes.yaxis.set_major_formatter(lambda value, _: number(value, unit))
    places = sorted(set(table[figure.x]))
    axes.set_xticks(places, _labels(places, log="x" in figure.log))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _log_ticks(axes: Axes, along: Literal["x", "y"], values: "pd.Series[float]", unit: str) -> None:
    """Powers of two for bytes; else 1, 2 and 5 of each decade, and more of them within a single one."""
    axis, scale = {"x": (axes.xaxis, axes.set_xscale), "y": (axes.yaxis, axes.set_yscale)}[along]
    if unit.startswith("B"):
        scale("log", base=2)
    else:
        scale("log")
        one_decade = values.min() > 0 and values.max() < 10 * values.min()
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if one_decade else (1, 2, 5)))
    shown = {"B": "B", "B/token": "B", "share": "share"}.get(unit, "")
    axis.set_major_formatter(lambda value, _: number(value, shown))
    axis.set_minor_locator(NullLocator())


def _beside(places: "pd.Series[float]", at: float, every: "pd.Series[float]", *, log: bool) -> "pd.Series[float]":
    """The places moved by `at` hundredths of the axis, so that the intervals of several arms do not hide each other."""
    if not pd.api.types.is_numeric_dtype(places):
        return places
    if log:
        return places * (every.max() / every.min()) ** (at / 100)
    return places + (every.max() - every.min()) * at / 100


def _labels(places: Sequence[Any], *, log: bool) -> list[str]:
    """The places as text; none where it would touch the label before: closer than a sixteenth of the axis."""
    if not all(isinstance(value, int | float) for value in places) or len(places) < 2:
        return [place(value) for value in places]
    at = [math.log(value) if log else float(value) for value in places]
    labels, last = [], -math.inf
    for value, here in zip(places, at, strict=True):
        clear = here - last >= (at[-1] - at[0]) / 16
        labels.append(place(value) if clear else "")
        last = here if clear else last
    return labels


def _keep_in_view(axes: Axes, values: Sequence[float]) -> None:
    """Cut the view where an interval of few replicates would dwarf the points; the tables have it whole."""
    least, most = min(values), max(values)
    if axes.get_yscale() == "log":
        edges = least / 4, most * 4
    else:
        span = (most - least) or abs(most) or 1.0
        edges = least - span, most + span
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, edges[0]), min(high, edges[1]))


def _mark(axes: Axes, figure: Figure, *, along: str) -> None:
    """The line of no effect, and the reference, where the figure has them."""
    row = metric(figure.metric)
    none = 0.0 if figure.against_baseline else 1.0 if row.unit == "ratio" and row.noise == "paired" else None
    line = axes.axhline if along == "y" else axes.axvline
    if none is not None:
        line(none, color=INK, linewidth=0.8, zorder=1)
    if figure.reference is not None:
        value, words = figure.reference
        line(value, color=CLAIMED, linewidth=1.2, linestyle=":", zorder=2, label=words)
