"""The page of the budgets: what a training step of a true-size model takes, and the claims that arithmetic answers.

From the records of `python -m bench.budget`, of which the last of each stands. Figures of arithmetic and traces are of
no machine; the allocator's, beside them, were measured on one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from ablations.claims import Verdict, ledger
from ablations.traced import Prose, mark
from bench.metrics import METRICS
from bench.record import Record
from reports import figures, inlined, twins
from reports.numbers import number, place, plain
from reports.pages import Drawn, Page, ruling
from reports.tables import MISSING, Table, failures

STUDY = "budget"
CLAIMS = ("H1", "H2")
COMMAND = "python -m bench.budget --preset deepseek_v3"
QUESTION = "What does a training step of a model of true size take, of which kind, on which rank; and what would a run?"
METRIC_OF_A_REPLICA = {"sent_bytes": "sent by a ring in a step", "live_bytes": "peak"}
KINDS = ("parameters", "gradients", "optimizer", "activations", "working")
NAMES = {"working": "working memory", "total": "together"}
SPLITS = (
    "tp, pp, ep, dp: ways of tensor, pipeline, expert and data parallelism; zero: stage of ZeRO; x: microbatches of a "
    "step; sp: sequences cut too; dual_pipe: DualPipe instead of 1F1B"
)
CARD, DRAWN_UP_TO = 80 * 2**30, 400 * 2**30
ASKED_HOURS = 72
NEARLY_NONE = 1e-5
INPUTS = {"tokens": 1e12, "cards": 1, "utilisation": 1, "price": 1}  # of a run, and in how many they are told
LIMITS = (
    "Splits over ranks are arithmetic: balanced routing, no fragments of an allocator, no buffers of collectives.",
    "Traced on fake tensors, every layer: the whole model on one device, and as one of several replicas that average "
    "their gradients. ZeRO and all other splits are not traced; nothing is timed.",
    "Attention's FLOPs are counted by the same causal formula in arithmetic and trace, so that part agrees by "
    "construction; a test holds the formula against torch's own count.",
    "DeepSeek-V3's own split is that with dual_pipe, weights and gradients twice; that part of its activations are "
    "kept in fp8 is not counted.",
    "Hours and prices are arithmetic on a utilisation that is assumed, for the final run alone.",
)
Where = Mapping[str, Any]
_MICROBATCH = {"model", "recipe", "recompute", "sequences", "length"}
# By arm the axes that a figure is found by, one set or another.
_PLACES: Mapping[str, tuple[set[str], ...]] = {
    "analytic": (_MICROBATCH,),
    "traced": (_MICROBATCH,),
    "allocator": (_MICROBATCH,),
    "rank": (_MICROBATCH | {"split", "kind"},),
    "published": ({"model", "quantity", "source", "note"}, {"change"}),
    "ours": ({"model", "quantity", "source", "note"},),
    "run": ({"change"}, {"curve", "cards"}, {"peer"}),
}


def placed(records: Sequence[Record]) -> tuple[list[Record], str]:
    """The records without those of budgets that stand nowhere on the page, and in a sentence which these are."""
    kept, strange = [], Counter[str]()
    for row in records:
        if row.study == STUDY and not any(place <= row.axes.keys() for place in _PLACES.get(row.arm, ())):
            strange[f"{row.metric} of {row.arm}"] += 1
        else:
            kept.append(row)
    named = ", ".join(f"{what} ({count})" for what, count in strange.items())
    said = f"{strange.total()} records of {STUDY} lack the axes that they are found by and were left out: {named}."
    return kept, said if strange else ""


def budget_page(records: Sequence[Record], found: Mapping[str, Verdict]) -> Page:
    """The page; one without records says how to get them."""
    newest = {(row.arm, row.metric, tuple(sorted(row.axes.items()))): row for row in records if row.study == STUDY}
    rows = tuple(row for row in newest.values() if row.error is None)
    used = {row.metric for row in rows}
    return Page(
        name=STUDY,
        title="budget",
        question=QUESTION,
        answers=(_answer(rows),),
        warning="",
        arms=(),
        baseline="",
        figures=(_ranks_figure(rows), _hours_figure(rows)) if rows else (),
        rulings=tuple(ruling(ledger()[claim], found[claim]) for claim in CLAIMS if claim in found),
        tables=_tables(rows),
        failures=failures([row for row in newest.values() if row.error is not None]),
        limits=LIMITS,
        metrics=tuple(row for row in METRICS if row.name in used),
        commands=(COMMAND, "python -m reports build"),
        origin=(("records", str(len(rows))),) if rows else (),
    )


def _answer(rows: Sequence[Record]) -> Prose:
    traced = _alone(rows, "traced")
    pairs = _pairs(rows, [row for row in traced if row.metric != "live_bytes"], "analytic")
    if not pairs:
        return Prose.of(f"Pending: {COMMAND}")
    models = ", ".join(dict.fromkeys(str(row.axes["model"]) for row in traced))
    said = (
        f"Arithmetic and trace of {models} differ by at most {_most(pairs)} in size, states, kept activations and FLOPs"
    )
    if peaks := _pairs(rows, [row for row in traced if row.metric == "live_bytes"], "analytic"):
        said += f", and by {_most(peaks)} in the peak"
    if peaks := _pairs(rows, _where(rows, arm="allocator"), "traced"):
        said += f"; the traced peak lies within {_most(peaks)} of the allocator's where the step fits in memory"
    return Prose.of(said + ".")


def _most(pairs: Sequence[tuple[Record, Record]]) -> str:
    """The largest deviation; one of a few bytes in billions is not told more closely than `NEARLY_NONE`."""
    first, second = max(pairs, key=lambda pair: abs(_deviation(*pair)))
    return mark(number(max(abs(_deviation(first, second)), NEARLY_NONE), "share"), (first.id, second.id))


def _tables(rows: Sequence[Record]) -> tuple[Table, ...]:
    made = [_agreement(rows), _replicas(rows), _published(rows)]
    for model in dict.fromkeys(str(row.axes["model"]) for row in _where(rows, arm="rank")):
        mine = [row for row in rows if row.axes.get("model") == model]
        made += [_modules(mine, model), _ranks(mine, model), _sent(mine, model)]
    return tuple(table for table in (*made, _runs(rows), _ratios(rows)) if table.rows)


def _agreement(rows: Sequence[Record]) -> Table:
    metrics = ("parameters", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "saved_bytes", "flops")
    traced, lines = _alone(rows, "traced"), []
    for at in dict.fromkeys(_of(row) for row in traced):
        here = {row.metric: row for row in traced if _of(row) == at}
        cells = [_compared(_partner(rows, here.get(name), "analytic"), here.get(name)) for name in metrics]
        real = [row for row in _where(rows, arm="allocator") if _of(row) == at]
        peak = here.get("live_bytes")
        ours = _compared(_partner(rows, peak, "analytic"), peak)
        lines.append((", ".join(at), *cells, _cell(peak), ours, _compared(peak, real[0] if real else None)))
    names = tuple(name.replace("_", " ") for name in metrics)
    return Table(
        caption="Arithmetic against the trace of one device",
        note="deviation from the trace; in the last column the trace's from the allocator",
        head=("model, recipe, recompute, tokens", *names, "traced peak", "peak by arithmetic", "against the allocator"),
        rows=tuple(lines),
    )


def _replicas(rows: Sequence[Record]) -> Table:
    lines = []
    for row in (row for row in _where(rows, arm="traced") if "split" in row.axes):
        what = METRIC_OF_A_REPLICA.get(row.metric, row.metric)
        ours = _partner(rows, row, "analytic")
        lines.append(
            (", ".join((*_of(row), str(row.axes["split"]))), what, _cell(ours), _cell(row), _compared(ours, row))
        )
    return Table(
        caption="One of several replicas of the whole model",
        note="gradients averaged at the end of a step, in flat buffers of all of them",
        head=("model, recipe, recompute, tokens, replicas", "", "arithmetic", "trace", "deviation"),
        rows=tuple(lines),
        texts=2,
    )


def _published(rows: Sequence[Record]) -> Table:
    lines = []
    for row in _where(rows, arm="published"):
        if "quantity" in row.axes:
            ours = _partner(rows, row, "ours")
            what = f"{row.axes['quantity']}, {row.axes['note']}".removesuffix(", ")
            deviation = _compared(ours, row)
            lines.append((str(row.axes["model"]), what, str(row.axes["source"]), _cell(row), _cell(ours), deviation))
    head = ("model", "quantity", "source", "published", "ours", "deviation")
    return Table(
        caption="Published figures", note="and what the config gives here", head=head, rows=tuple(lines), texts=3
    )


def _modules(rows: Sequence[Record], model: str) -> Table:
    found = [row for row in _last(rows, "module") if row.metric == "saved_bytes"]
    return _grid(found, "module", "recompute", f"Kept for backward of a microbatch: {model}")


def _ranks(rows: Sequence[Record], model: str) -> Table:
    found = [row for row in _last(rows, "kind") if row.metric == "rank_bytes"]
    by_split = {(str(row.axes["split"]), str(row.axes["recompute"]), str(row.axes["kind"])): row for row in found}
    names = dict.fromkeys((split, policy) for split, policy, _ in by_split)
    kinds = (*KINDS, "total")
    lines = [(*name, *(_cell(by_split.get((*name, kind))) for kind in kinds)) for name in names]
    caption, note = f"Fullest rank: {model}", Prose.of(f"{_said(found)}{_held(rows)}. {SPLITS}")
    head = ("split", "recompute", *(NAMES.get(kind, kind) for kind in kinds))
    return Table(caption=caption, note=note, head=head, rows=tuple(lines), texts=2)


def _held(rows: Sequence[Record]) -> str:
    """How far the arithmetic of a rank lies from the trace, where one device is the rank."""
    peaks = _pairs(rows, [row for row in _alone(rows, "traced") if row.metric == "live_bytes"], "analytic")
    return f"; for one device at most {_most(peaks)} from the traced peak" if peaks else ""


def _sent(rows: Sequence[Record], model: str) -> Table:
    found = [row for row in _last(rows, "kind") if row.metric == "sent_bytes"]
    return _grid(found, "split", "kind", f"Sent by that rank in a step: {model}")


def _runs(rows: Sequence[Record]) -> Table:
    changes = [row for row in rows if "change" in row.axes]
    lines = []
    for change in dict.fromkeys(str(row.axes["change"]) for row in changes):
        here = {row.metric: row for row in changes if row.axes["change"] == change}
        inputs = next(iter(here.values())).axes
        told = [str(inputs.get("run")), *(_input(inputs, name) for name in INPUTS)]
        lines.append((change, *told, _cell(here.get("run_hours")), _cell(here.get("run_dollars"))))
    head = ("changed", "model", "trillion tokens", "cards", "share of peak", "dollars an hour", "hours", "dollars")
    return Table(
        caption="A run by arithmetic", note="one input changed at a time", head=head, rows=tuple(lines), texts=2
    )


def _ratios(rows: Sequence[Record]) -> Table:
    lines = [(str(row.axes["peer"]), _cell(row)) for row in rows if row.metric == "relative_cost"]
    caption = "Cost of the sparse run against runs whose cost one could call usual"
    return Table(caption=caption, note="the claim says 0.2", head=("peer", "cost ratio"), rows=tuple(lines))


def _ranks_figure(rows: Sequence[Record]) -> Drawn:
    found = [row for row in rows if row.metric == "rank_bytes"]
    if not found:
        return _pending("ranks", "Memory of the fullest rank by kind")
    model = str(max(found, key=lambda row: row.value or 0).axes["model"])
    here = _last([row for row in found if row.axes["model"] == model], "kind")
    bars = _bars(here)
    with figures.styled():
        picture = Picture(figsize=(7.4, 0.9 + 0.32 * len(bars)), layout="constrained")
        _draw_ranks(picture.subplots(), bars)
    caption = f"Memory of the fullest rank by kind: {model}, {_said(here)}, splits of at most 400 GiB a rank"
    return _drawn("ranks", caption, picture, here)


def _bars(rows: Sequence[Record]) -> dict[str, dict[str, float]]:
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{row.axes['split']}, {row.axes['recompute']}"
        bars.setdefault(name, {})[str(row.axes["kind"])] = float(row.value or 0)
    whole = {name: kinds for name, kinds in bars.items() if {*KINDS, "total"} <= kinds.keys()}
    return {name: kinds for name, kinds in whole.items() if kinds["total"] <= DRAWN_UP_TO}


def _draw_ranks(axes: Axes, bars: Mapping[str, Mapping[str, float]]) -> None:
    names = list(bars)
    starts = [0.0] * len(names)
    for at, kind in enumerate(KINDS):
        sizes = [bars[name][kind] / 2**30 for name in names]
        label = NAMES.get(kind, kind)
        drawn = axes.barh(range(len(names)), sizes, left=starts, color=figures.COLOURS[at], height=0.7, label=label)
        for bar in drawn:
            bar.set_label(label)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    axes.axvline(CARD / 2**30, color=figures.INK, linewidth=1, linestyle=":")
    axes.annotate("80 GiB", (CARD / 2**30, 1.0), xycoords=("data", "axes fraction"), fontsize=7.5, va="bottom")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="GiB")
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    handles = [drawn[0] for drawn in axes.containers]
    axes.legend(handles, [NAMES.get(kind, kind) for kind in KINDS], loc="center left", bbox_to_anchor=(1.01, 0.5))


def _hours_figure(rows: Sequence[Record]) -> Drawn:
    caption = "Hours of a run on 14.8 trillion tokens at DeepSeek-V3's share of the bf16 peak, by how many cards"
    found = [row for row in rows if "curve" in row.axes and not isinstance(row.axes["cards"], str)]
    if not found:
        return _pending("hours", caption)
    with figures.styled():
        picture = Picture(figsize=(6.0, 3.4), layout="constrained")
        axes = picture.subplots()
        for at, curve in enumerate(dict.fromkeys(str(row.axes["curve"]) for row in found)):
            points = sorted((float(row.axes["cards"]), row.value or 0) for row in found if row.axes["curve"] == curve)
            look: dict[str, Any] = {"color": figures.COLOURS[at], "marker": figures.MARKERS[at], "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=curve, **look)
        axes.axhline(ASKED_HOURS, color="#d1242f", linewidth=1.2, linestyle=":", label="72 hours")
        axes.set(xlabel="cards", ylabel="hours", yscale="log")
        axes.set_xscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: plain(value))
        axes.xaxis.set_major_formatter(lambda value, _: place(value))
        axes.grid(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _drawn("hours", caption, picture, found)


def _pending(kind: str, caption: str) -> Drawn:
    return _drawn(kind, caption, figures.pending(caption, f"no record of it yet: {COMMAND}"), ())


def _drawn(kind: str, caption: str, picture: Picture, rows: Sequence[Record]) -> Drawn:
    name = f"{STUDY}-{kind}"
    files = figures.render(picture, name, figures.provenance(STUDY, kind, rows))
    twin = tuple(twins.of_picture(picture, caption))
    inline = inlined.inline(files["svg"], name, caption, twin=bool(twin))
    return Drawn(name=name, caption=caption, titled=False, files=files, inline=inline, twin=twin)


def _grid(rows: Sequence[Record], down: str, across: str, caption: str) -> Table:
    """Values of one axis down, of another across."""
    cells = {(str(row.axes[down]), str(row.axes[across])): _cell(row) for row in rows}
    columns = tuple(dict.fromkeys(name for _, name in cells))
    names = dict.fromkeys(name for name, _ in cells)
    lines = tuple((name, *(cells.get((name, column), MISSING) for column in columns)) for name in names)
    return Table(caption=caption, note=_said(rows), head=(down, *columns), rows=lines)


def _last(rows: Sequence[Record], axis: str) -> list[Record]:
    """The records with this axis that the last run of the command left."""
    found = [row for row in rows if axis in row.axes]
    return [row for row in found if _microbatch(row) == _microbatch(found[-1])]


def _microbatch(row: Record) -> tuple[Any, ...]:
    return tuple(row.axes.get(name) for name in ("model", "recipe", "sequences", "length"))


def _said(rows: Sequence[Record]) -> str:
    axes = rows[0].axes if rows else {}
    return f"{axes.get('recipe')}, {axes.get('sequences')} x {axes.get('length')} tokens"


def _of(row: Record) -> tuple[str, ...]:
    axes = row.axes
    return str(axes["model"]), str(axes["recipe"]), str(axes["recompute"]), f"{axes['sequences']} x {axes['length']}"


def _where(rows: Iterable[Record], *, arm: str) -> list[Record]:
    return [row for row in rows if row.arm == arm]


def _alone(rows: Iterable[Record], arm: str) -> list[Record]:
    """The arm's records of one device, which is no replica of others."""
    return [row for row in _where(rows, arm=arm) if "split" not in row.axes]


def _pairs(rows: Sequence[Record], of: Iterable[Record], arm: str) -> list[tuple[Record, Record]]:
    """Each of these records after that of the same point by the other arm, where that is there and a share of it is."""
    found = [(_partner(rows, row, arm), row) for row in of]
    return [(partner, row) for partner, row in found if partner is not None and _comparable(partner, row)]


def _partner(rows: Iterable[Record], row: Record | None, arm: str) -> Record | None:
    """The record of the same point by another arm; None where it is missing."""
    if row is None:
        return None
    return next((other for other in rows if (other.arm, other.metric, other.axes) == (arm, row.metric, row.axes)), None)


def _deviation(first: Record, second: Record) -> float:
    assert first.value is not None, "records without a value are among the failures"
    return first.value / second.value - 1 if second.value else 0.0


def _comparable(first: Record, second: Record) -> bool:
    """Whether there is a share of the second, or nothing of either."""
    return bool(second.value) or first.value == second.value


def _compared(first: Record | None, second: Record | None) -> str:
    if first is None or second is None or not _comparable(first, second):
        return MISSING
    return Prose.of(mark(f"{100 * _deviation(first, second):+.2f}%", (first.id, second.id)))


def _cell(row: Record | None) -> str:
    if row is None:
        return MISSING
    assert row.value is not None, "records without a value are among the failures"
    large = row.unit in ("h", "$") and row.value >= 1000
    return Prose.of(mark(f"{row.value:,.0f}" if large else number(row.value, row.unit), (row.id,)))


def _input(axes: Where, name: str) -> str:
    value = axes.get(name, MISSING)
    return f"{value / INPUTS[name]:g}" if isinstance(value, int | float) else place(value)
