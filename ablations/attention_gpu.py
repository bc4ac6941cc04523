"""How much faster is attention to blocks found down a tree on a GPU, and do few key-value heads change that?

One layer's attention without its projections (`bench.block_attention`), forward and backward in bf16: 32 query heads of
width 128, the sizes that published sparse kernels are timed at, so that 16 query heads to a key-value head still leave
two of these. Each query head chooses 1024 keys in blocks of 64 for itself, choosing inside the time. The baseline is
whichever of torch's fused kernels is the fastest at that very point; the one that writes the matrix of weights out is
none of them. All kernels of a point are checked and timed in one process, in turns.

Without a GPU a cell says that it is pending and measures nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ablations.evidence import Estimate, NoEvidence, mean
from ablations.study import Arm, Cell, Figure, Reading, Study, grid
from ablations.traced import note_read
from bench.attention_sizes import BLOCK_ARMS
from bench.record import Profile, Record

if TYPE_CHECKING:
    from bench.block_attention import Inputs

LENGTHS: Mapping[Profile, tuple[int, ...]] = {"quick": (16384,), "full": (16384, 32768, 65536, 131072)}
SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
HEADS, WIDTH = 32, 128
SHARING = (1, 2, 4, 8, 16)  # query heads per key-value head
SHARED = "query heads per key-value head"
BLOCKS = 7  # give an interval of the median
PHASE = "forward_backward"
RATIO, SECONDS, CHOOSING = f"{PHASE}_wall_ratio", "wall_seconds", "selection_wall_share"
OURS = "hierarchical"
TORCH: Mapping[str, str] = {
    "flash": "dense, torch's FlashAttention",
    "cudnn": "dense, cuDNN's kernel",
    "efficient": "dense, torch's memory-efficient kernel",
}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A process per length and seed, which goes over the numbers of key-value heads."""
    return tuple(
        cell
        for seed in range(SEEDS[profile])
        for length in LENGTHS[profile]
        for cell in grid(
            seconds=60 + 6e-9 * length**2,
            seeds=(seed,),
            length=(length,),
            dtype=("bf16",),
            heads=(HEADS,),
            width=(WIDTH,),
        )
    )


def measure(cell: Cell) -> list[Reading]:
    """Times of the tree and of torch's kernels for every number of key-value heads, or why there are none."""
    if missing := why_not(cell.device):
        return [Reading(arm=OURS, metric=RATIO, pending=missing)]
    return [reading for sharers in SHARING for reading in shared(cell, sharers)]


def why_not(device: str) -> str | None:
    """None where that device is a GPU that torch can use; otherwise what is missing."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return None if device == "cuda" else "it is timed on a GPU alone: run it with --device cuda"


def shared(cell: Cell, sharers: int) -> list[Reading]:
    """Times of every arm that agrees with plain PyTorch, where `sharers` query heads share a key-value head."""
    import torch

    from bench import block_attention

    heads = int(cell.axes["heads"])
    given = block_attention.inputs(
        int(cell.axes["length"]),
        torch.bfloat16,
        cell.device,
        heads=heads,
        groups=heads // sharers,
        width=int(cell.axes["width"]),
        seed=cell.seed or 0,
    )
    able, axes, readings = list[str](), {SHARED: sharers}, list[Reading]()
    for arm in (*TORCH, OURS):
        if missing := block_attention.why_not(arm, given):
            readings.append(Reading(arm=arm, metric=RATIO, pending=missing, axes=axes))
            continue
        try:
            block_attention.check_heads(arm, given)
            able.append(arm)
        except AssertionError as error:
            readings.append(Reading(arm=arm, metric=RATIO, failed=str(error), axes=axes))
    if OURS in able and len(able) > 1:
        readings += _timed(cell, able, given, sharers)
    return readings


def _timed(cell: Cell, arms: Sequence[str], given: "Inputs", sharers: int) -> list[Reading]:
    """Seconds of each arm, its ratio to the fastest of torch's, and the part of the tree's that goes into choosing."""
    from bench import block_attention
    from bench.cases import sessions
    from bench.meters.paired import over_blocks, plan, ratios, seconds, summary, threads, time_block

    calls: dict[str, Callable[[], object]] = {arm: partial(block_attention.training, arm, given) for arm in arms}
    calls["choosing"] = partial(block_attention.choose, OURS, given)
    session = sessions(cell.device)[-1]  # that of wall time, on a CPU too
    with threads(session.threads):
        number = plan(calls, least=BLOCKS, seconds=0.0, clock=session.clock).calls
        first = 2 * (cell.seed or 0)
        taken = [time_block(calls, first + block, number, session.clock) for block in range(BLOCKS)]
    fastest = min((arm for arm in arms if arm in TORCH), key=lambda arm: seconds(taken, arm, "wall").value)
    taken = [block | {"sdpa": block[fastest]} for block in taken]
    found = [(arm, row) for arm in ("sdpa", *arms) for row in summary(taken, arm, "sdpa", PHASE, session.hands)]
    found.append((OURS, over_blocks(CHOOSING, ratios(taken, "choosing", OURS, "wall"))))
    return [Reading(arm=arm, measurement=row, axes={SHARED: sharers}) for arm, row in found]


def answer(records: Sequence[Record]) -> str:
    """At each length: how much faster at the worst number of key-value heads, how far these lie apart, and choosing."""
    lengths = sorted({int(row.axes["length"]) for row in records if row.metric == RATIO and row.error is None})
    said = []
    for length in lengths:
        speed = over_sharing(records, RATIO, length, max).map(lambda share: 1 / share)
        apart = over_sharing(records, SECONDS, length, lambda values: max(values) / min(values))
        choosing = over_sharing(records, CHOOSING, length, max)
        said.append(
            f"At {length} tokens forward and backward are {speed} times as fast as the fastest of torch's kernels at "
            f"the worst number of query heads that share keys; the times of these numbers lie within a factor of "
            f"{apart}, and choosing is at most {choosing} of them."
        )
    if not said:
        raise NoEvidence("nothing was timed on a GPU")
    return " ".join(said)


def over_sharing(
    records: Sequence[Record], metric: str, length: int, of: Callable[[Sequence[float]], float]
) -> Estimate:
    """What `of` makes of the tree's values for all numbers of key-value heads in each process, and the mean of that.

    Raises:
        NoEvidence: no process has all of them.
    """
    rows = [row for row in records if (row.arm, row.metric, row.axes["length"]) == (OURS, metric, length)]
    rows = [row for row in rows if row.error is None]
    seeds: dict[int | None, dict[int, float]] = {}
    for row in rows:
        seeds.setdefault(row.seed, {})[int(row.axes[SHARED])] = float(row.value or 0.0)
    whole = [list(values.values()) for values in seeds.values() if values.keys() == set(SHARING)]
    if not whole:
        raise NoEvidence(f"no process has {metric} at {length} tokens for every number of key-value heads")
    note_read(rows)
    return mean([of(values) for values in whole], geometric=True)


def _figures() -> tuple[Figure, ...]:
    return (
        Figure(
            "speed",
            "Forward and backward time against torch's fastest kernel, no keys shared",
            metric=RATIO,
            x="length",
            where={SHARED: SHARING[0]},
            log="xy",
        ),
        Figure(
            "sharing",
            f"Forward and backward by query heads that share keys, {LENGTHS['quick'][0]} tokens",
            metric=SECONDS,
            x=SHARED,
            where={"length": LENGTHS["quick"][0]},
            log="xy",
        ),
        Figure(
            "choosing",
            "Share of forward and backward that goes into choosing, no keys shared",
            metric=CHOOSING,
            x="length",
            where={SHARED: SHARING[0]},
            log="x",
        ),
    )


STUDY = Study(
    name="attention_gpu",
    question="How much faster is attention down a tree on a GPU, and do few key-value heads change that?",
    arms=(
        Arm("sdpa", "the fastest of torch's fused kernels at that point"),
        *(Arm(name, words) for name, words in TORCH.items()),
        Arm(OURS, f"{BLOCK_ARMS[OURS]}, this project's Triton kernel"),
    ),
    baseline="sdpa",
    metrics=(RATIO, SECONDS, CHOOSING),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    figures=_figures(),
    answer=answer,
    limits=(
        "Attention alone, one sequence: a model's projections and experts grow with n and dilute every ratio.",
        "Inputs are random, and so are the chosen blocks: real ones lie closer together, in nearer caches.",
        "Numbers of key-value heads are timed one after the other: only the kernels at one number take turns.",
    ),
)
