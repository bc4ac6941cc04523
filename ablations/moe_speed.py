"""How near does a layer of experts come to a dense one? Forward and backward over a grid of shapes, against its peers.

A dense layer of the same FLOPs reads its weights once for all tokens; experts read E of them for a few rows each, sort
their rows and add up what comes back. What is left of the dense speed is the figure here, at its best: the dense layer
is torch's own, the same compiled, or this project's kernel with a single expert, whichever is faster. The peer too is
timed as it is and compiled. `bench.expert_layers` says what the arms are.

The grid: 8, 64 and 128 experts, 2 or 8 of them a token, 8 to 512 rows for each, widths of 256 and 1024 with experts
half and a quarter as wide, both number formats, routing of real text or balanced. Figures of the grid are geometric
means over its shapes, taken in each process, so that their intervals are over processes.

Where rows are filled up to those of the fullest expert, a capacity is what turns padding into speed: `padded_1.2` is
timed beside `padded`, with the share of pairs that it drops for it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any

from ablations.evidence import Estimate, NoEvidence, mean
from ablations.study import Arm, Cell, Figure, Reading, Study, Value, grid
from ablations.traced import note_read
from bench.measurement import Measurement
from bench.record import Profile, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 3}  # processes
ROWS = (8, 32, 256, 512)
FEW, MANY = 32, 256  # rows of which products are short, and from which they are long
# What is asked of the kernel: of the fastest dense layer's speed from MANY rows on and at FEW; of that of both peers in
# the mean, and of transformers' at every shape and, in bf16, up to FEW rows.
ASKED_MANY: Mapping[str, float] = {"fp32": 0.92, "bf16": 0.85}
ASKED_FEW = 0.65
ASKED_MEAN, ASKED_WORST = 1.3, 1.0
ASKED_UP_TO_FEW: Mapping[str, float] = {"bf16": 1.6}
INNER = {256: 128, 1024: 256}  # width of an expert, by the model's
FLOPS = 2_000_000_000  # of an arm in a block, at least
METRIC = "forward_backward_cpu_ratio"
PEER = "transformers"
COMPILED_PEER, PADDED_PEER = "transformers_compiled", "padded_128"
WHOLE, LIMITED = "padded", "padded_1.2"
FACTOR = 1.2  # of its capacity, the article's
DENSE = ("dense", "dense_compiled", "dense_kernel")
DRAWN = ("kernel", "looped", PEER, COMPILED_PEER, PADDED_PEER, WHOLE, LIMITED)
CHANGES: Mapping[str, str] = {
    "transformers": "DeepSeek-V3's experts there, on torch's grouped product",
    "transformers_compiled": "the same, compiled by torch for each shape",
    "kernel": "this project's C++ kernel",
    "looped": "this project's loop of torch's products",
    "padded_128": "rows filled up to multiples of 128 for the grouped product, as MegaBlocks does",
    "padded": "rows filled up to those of the fullest expert for one batched product",
    "padded_1.2": f"the same at capacity {FACTOR:g}, which drops what finds no room",
    "dense": "no experts: a SwiGLU of as many FLOPs, torch's products",
    "dense_compiled": "the same, compiled by torch for each shape",
    "dense_kernel": "the same by this project's kernel, as one expert",
}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per process a cell for each width, number of experts and format, which goes over rows, k and routing: all of them
    where `least`, the fewest rows, is that of the grid, or two points.
    """
    if profile == "quick":
        return grid(seconds=4, seeds=(0,), width=(256,), experts=(8,), dtype=("fp32",), least=(FEW,), threads=(1,))
    return grid(
        seconds=600,
        seeds=range(SEEDS[profile]),
        width=tuple(INNER),
        experts=(8, 64, 128),
        dtype=("fp32", "bf16"),
        least=ROWS[:1],
        threads=(1,),
    )


def measure(cell: Cell) -> list[Reading]:
    """Times of all arms against the peer's at every point of the cell, interleaved."""
    import torch

    torch.set_num_threads(int(cell.axes["threads"]))
    whole = cell.axes["least"] == ROWS[0]
    points = [
        (rows, k, routed)
        for rows in (ROWS if whole else (FEW, MANY))
        for k, routed in (product((2, 8), ("text", "balanced")) if whole else ((2, "text"),))
    ]
    return [reading for point in points for reading in _timed(cell, *point, compiling=whole)]


def _timed(cell: Cell, rows: int, k: int, routed: str, *, compiling: bool) -> list[Reading]:
    import torch

    from bench import expert_layers
    from bench.meters.paired import process_clock, ratio, time_block
    from dsv3.moe.load import dropped_share

    width, experts, seed = int(cell.axes["width"]), int(cell.axes["experts"]), cell.seed or 0
    shape = expert_layers.Shape(rows * experts // k, width, INNER[width], experts, k)
    dtype = torch.float32 if cell.axes["dtype"] == "fp32" else torch.bfloat16
    build = partial(expert_layers.build, shape, dtype, torch.device("cpu"), routed=routed, seed=seed)
    lacking = dict.fromkeys(() if compiling else expert_layers.COMPILED, "compiling takes longer than a quick run")
    torch.compiler.reset()  # of too many shapes it would compile none
    arms = build(names=[name for name in CHANGES if name not in lacking])
    if rows <= FEW:  # with more, a reference in float64 takes longer than all arms together
        expert_layers.check(arms | build(names=expert_layers.TRUTHS), dtype)
    steps = {name: arm.step for name, arm in arms.items()}
    for step in steps.values():
        step()
    # One block: what decides is the grid's mean, and its spread over processes, whose orders differ.
    taken = [time_block(steps, seed, max(1, FLOPS // shape.flops), process_clock)]
    axes: dict[str, Value] = {"rows": rows, "k": k, "routing": routed}
    found = [
        Reading(arm=arm, measurement=ratio(taken, arm, PEER, "forward_backward", "cpu"), axes=axes)
        for arm in arms
        if arm != PEER
    ]
    lacking |= {name: "the C++ kernel cannot be built here" for name in expert_layers.KERNEL if name not in arms}
    lost = dropped_share(expert_layers.limited(expert_layers.routing_of(shape, routed, seed)).kept)
    found.append(Reading(arm=LIMITED, measurement=Measurement(metric="drop_share", value=lost), axes=axes))
    return found + [Reading(arm=arm, metric=METRIC, pending=why, axes=axes) for arm, why in lacking.items()]


Point = Mapping[str, float]  # the arms' times at one point of the grid, as shares of the peer's


def answer(records: Sequence[Record]) -> str:
    """What is left of the dense speed at many and at few rows, and how much faster than the peers that is, beside what
    was asked.
    """
    said = []
    for dtype in ASKED_MANY:
        with suppress(NoEvidence):
            said.append(_beside_dense(records, dtype))
            said.append(_beside_peers(records, dtype))
            said.append(_beside_the_peers_best(records, dtype))
            said.append(_by_capacity(records, dtype))
    if not said:
        raise NoEvidence("the kernel has not been timed beside a dense layer")
    return " ".join(said)


def _beside_dense(records: Sequence[Record], dtype: str) -> str:
    many = over_grid(records, dtype, _of_dense, lambda rows: rows >= MANY)
    few = over_grid(records, dtype, _of_dense, lambda rows: rows == FEW)
    alone = ", of one process and so without intervals," if many.low is None else ""
    return (
        f"In {dtype}{alone} the kernel reaches {_told(many)} of the fastest dense layer's speed from {MANY} rows an "
        f"expert on ({ASKED_MANY[dtype]:g} asked) and {_told(few)} at {FEW} rows ({ASKED_FEW:g} asked)."
    )


def _beside_peers(records: Sequence[Record], dtype: str) -> str:
    whole, worst, few = _of_shapes(records, dtype, _of_peer)
    padded = over_grid(records, dtype, _of_padded, lambda rows: rows == FEW)
    asked = f" ({ASKED_UP_TO_FEW[dtype]:g} asked)" if dtype in ASKED_UP_TO_FEW else ""
    return (
        f"It is {whole} times as fast as transformers over all shapes ({ASKED_MEAN:g} asked), {worst} times at the "
        f"worst one ({ASKED_WORST:g} asked) and {few} times up to {FEW} rows{asked}. At {FEW} rows it is "
        f"{_told(padded)} times as fast as the layer that fills them up to 128 ({ASKED_MEAN:g} asked)."
    )


def _beside_the_peers_best(records: Sequence[Record], dtype: str) -> str:
    whole, worst, few = _of_shapes(records, dtype, _of_best_peer)
    return (
        f"Against transformers in its faster mode at each shape, as it is or compiled, it is {whole} times as fast "
        f"over all shapes, {worst} times at the worst one and {few} times up to {FEW} rows."
    )


def _by_capacity(records: Sequence[Record], dtype: str) -> str:
    """What a capacity saves where every expert's rows are filled up to as many."""
    gained = over_grid(records, dtype, _of_unlimited, lambda rows: True, routing="text")
    behind = over_grid(records, dtype, _of_limited, lambda rows: True, routing="text")
    lost = _lost(records, dtype).map(lambda share: 100 * share)
    return (
        f"Routed as real text is, rows filled up to a capacity of {FACTOR:g} are {_told(gained)} times as fast as up "
        f"to the fullest expert, for {_told(lost)}% of the pairs dropped; the kernel, which drops none, is "
        f"{_told(behind)} times as fast as that."
    )


def _lost(records: Sequence[Record], dtype: str) -> Estimate:
    """The share of pairs that the capacity drops, the mean over the grid in each process."""
    rows = [row for row in records if (row.metric, row.axes.get("routing")) == ("drop_share", "text")]
    rows = [row for row in rows if row.error is None and row.axes["dtype"] == dtype]
    if not rows:
        raise NoEvidence(f"nothing was dropped in {dtype}")
    note_read(rows)
    seeds = {row.seed for row in rows}
    return mean([fmean(float(row.value or 0.0) for row in rows if row.seed == seed) for seed in seeds])


def _of_shapes(records: Sequence[Record], dtype: str, of_point: Callable[[Point], float]) -> tuple[str, str, str]:
    """The mean over all shapes, the worst of them, and the mean up to FEW rows."""
    whole = over_grid(records, dtype, of_point, lambda rows: True)
    worst = over_grid(records, dtype, of_point, lambda rows: True, of=min)
    few = over_grid(records, dtype, of_point, lambda rows: rows <= FEW)
    return _told(whole), _told(worst), _told(few)


def _told(found: Estimate) -> str:
    """The value alone where there is no interval, which the sentence says once."""
    return f"{found.value:.3g}" if found.low is None else str(found)


def _of_dense(point: Point) -> float:
    return min(point[arm] for arm in DENSE if arm in point) / point["kernel"]


def _of_peer(point: Point) -> float:
    return 1 / point["kernel"]


def _of_padded(point: Point) -> float:
    if PADDED_PEER not in point:
        raise NoEvidence("rows filled up to 128 have not been timed")
    return point[PADDED_PEER] / point["kernel"]


def _of_unlimited(point: Point) -> float:
    if not {WHOLE, LIMITED} <= point.keys():
        raise NoEvidence("a capacity has not been timed")
    return point[WHOLE] / point[LIMITED]


def _of_limited(point: Point) -> float:
    return point[LIMITED] / point["kernel"]


def _of_best_peer(point: Point) -> float:
    """As it is, a time of 1, or compiled, whichever is faster at the point."""
    if COMPILED_PEER not in point:
        raise NoEvidence("the peer has not been timed compiled")
    return min(1.0, point[COMPILED_PEER]) / point["kernel"]


def over_grid(
    records: Sequence[Record],
    dtype: str,
    value: Callable[[Point], float],
    which: Callable[[int], bool],
    *,
    of: Callable[[Iterable[float]], float] = geometric_mean,
    **where: Value,
) -> Estimate:
    """The geometric mean (or `of`) over the grid's points with such rows, in each process, and then over processes;
    `where` are axes of the points that count.

    Raises:
        NoEvidence: no such point has all arms that were timed, the kernel among them.
    """
    seeds: dict[int | None, dict[object, dict[str, float]]] = {}
    rows = [row for row in records if row.metric == METRIC and row.error is None and row.axes["dtype"] == dtype]
    needed = {row.arm for row in rows} | {"kernel"}
    rows = [row for row in rows if which(int(row.axes["rows"])) and where.items() <= row.axes.items()]
    for row in rows:
        point = seeds.setdefault(row.seed, {}).setdefault(tuple(sorted(row.axes.items(), key=str)), {})
        point[row.arm] = float(row.value or 0.0)
    each = [[value(point) for point in points.values() if point.keys() >= needed] for points in seeds.values()]
    if not any(each):
        raise NoEvidence(f"no point in {dtype} has all arms")
    note_read(rows)
    return mean([of(values) for values in each if values], geometric=True)


def speeds(table: Any) -> "Picture":
    """Share of the fastest dense layer's speed against rows per expert, by format; a mean over all other axes."""
    import numpy as np
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"] == METRIC]
    if rows.empty:
        raise NoEvidence("nothing has been timed")
    formats = [dtype for dtype in ("fp32", "bf16") if dtype in set(rows["dtype"])]
    picture = Picture(figsize=(6.4, 3.6), layout="constrained")
    panels = picture.subplots(1, len(formats), squeeze=False)[0]
    for axes, dtype in zip(panels, formats, strict=True):
        points = rows[rows["dtype"] == dtype].pivot_table(
            index=["rows", "width", "experts", "k", "routing"], columns="arm", values="value"
        )
        points[PEER] = 1.0
        best = points.filter(items=DENSE).min(axis=1)
        for arm in points.columns.intersection(DRAWN, sort=False):
            share = np.exp(np.log(best / points[arm]).groupby("rows").mean())
            axes.plot(share.index, share, marker="o", label=arm if axes is panels[0] else None)
        axes.axhline(1.0, color="#7f7f7f", linestyle=":", label="dense" if axes is panels[0] else None)
        axes.set(xscale="log", xlabel="rows per expert", title=dtype)
        axes.set_xticks(sorted(set(points.index.get_level_values("rows"))), labels=None)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(visible=True)
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)
    panels[0].set_ylabel("share of the fastest dense layer's speed")
    picture.legend(loc="outside lower center", ncols=3)
    return picture


STUDY = Study(
    name="moe_speed",
    question="How near does a layer of experts come to a dense one?",
    arms=tuple(Arm(name, changes) for name, changes in CHANGES.items()),
    baseline=PEER,
    metrics=(METRIC, "drop_share"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    figures=(Figure("speed", "Speed of the experts against rows per expert, with the dense limit", draw=speeds),),
    answer=answer,
    limits=(
        "One layer by itself, its routing given: no router, no attention, no optimizer that reads the gradients.",
        "One thread by CPU time, all arms in one process. The time of compiling, once a shape, is left out.",
        f"Arms are checked against a reference in float64 up to {FEW} rows an expert; with more they are only timed.",
        "Our arms get their memory for gradients back from call to call, as in training; transformers asks anew.",
    ),
)
