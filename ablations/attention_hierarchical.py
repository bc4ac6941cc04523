"""Attention to blocks found down a tree: how much faster than dense attention, and whether the tree earns its keep.

One layer's attention without its projections (`bench.block_attention`): 4 heads of width 64, batch 1, random inputs,
1024 keys per query in blocks of 64, choosing inside the time. A ratio to SDPA mixes two things, which stand beside it:

    what the code gains      SDPA against our kernel's dense form
    what the choice gains    our dense form against our kernel on the chosen blocks

and a window of as many blocks says what is left when choosing costs nothing. Scores are counted, not timed: the closed
form of `dsv3.config.counts`, up to a million tokens, for blocks of queries and for single ones; what a search by bounds
opens has none and is counted on random inputs. One head of a million tokens, each choosing for itself, is computed
once, to see that it can be.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ablations.attention_hierarchical_pictures import BASELINE, MILLION, growth, scores
from ablations.evidence import Estimate, NoEvidence, compare, estimate, exponent, replicates
from ablations.study import Arm, Cell, Figure, Reading, Study, Value, grid
from bench.attention_sizes import BLOCK, BLOCK_ARMS, BRANCHING, SEEN
from bench.fingerprint import cores
from bench.measurement import Measurement
from bench.record import Profile, Record
from dsv3.config import Blocks, Hierarchical, vary
from dsv3.config.counts import scored_in_all

if TYPE_CHECKING:
    import torch

    from bench.block_attention import Inputs

LENGTHS: Mapping[Profile, tuple[int, ...]] = {"quick": (2048,), "full": (4096, 16384, 32768, 65536)}
DTYPES: Mapping[Profile, tuple[str, ...]] = {"quick": ("fp32",), "full": ("fp32", "bf16")}
SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
COUNTED = tuple(2**power for power in range(12, 21))
OPENED = (4096, 8192, 16384)  # tokens at which it is counted what a search by bounds scores
JOINED = (4096, 16384)  # tokens at which it is counted what 64 queries read together
SHARING = (1, 4)  # query heads per key-value head
CHOICES: Mapping[str, Callable[[int], Blocks]] = {
    "blocks": lambda size: Blocks(k=SEEN, block_q=size, block_k=BLOCK),
    "hierarchical": lambda size: Hierarchical(k=SEEN, block_q=size, block_k=BLOCK, branching=BRANCHING),
}
FLEX = 16384  # tokens at which FlexAttention is timed: it is compiled anew for every length
TRACED = 16384  # tokens up to which bytes are counted
PHASES = ("forward", "forward_backward")
CHOOSING = ("blocks", "hierarchical", "best_first")


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A process per length, format and seed at one thread; one of counts; in full, one of a million tokens."""
    timed = tuple(
        cell
        for seed in range(SEEDS[profile])
        for length in LENGTHS[profile]
        for cell in grid(
            seconds=20 + 8e-8 * length**2 * blocks(length),
            seeds=(seed,),
            part=("time",),
            dtype=DTYPES[profile],
            length=(length,),
            threads=(1,),
        )
    )
    counted = grid(seconds=5, timed=False, part=("counts",))
    if profile == "quick":
        return timed + counted
    million = grid(seconds=90, part=("a million tokens",), length=(MILLION,), dtype=("fp32",), threads=(cores(),))
    return timed + counted + million


def blocks(length: int) -> int:
    """Interleaved blocks of one process: fewer where a call lasts long enough to be told apart."""
    return max(1, min(7, 65536 // length))


def measure(cell: Cell) -> list[Reading]:
    """Counts, the run of a million tokens, or the times of every arm that agrees with the reference."""
    match cell.axes["part"]:
        case "counts":
            return counts() + opened() + unions()
        case _ if cell.device != "cpu":
            why = "it is timed on a CPU alone: attention_gpu has the times of a GPU"
            return [Reading(arm="hierarchical", metric="forward_cpu_ratio", pending=why)]
        case "time":
            return times(cell)
        case _:
            return million(cell)


def counts() -> list[Reading]:
    """Scores that choosing takes in one head over a whole sequence."""
    return [
        Reading(
            arm=arm,
            measurement=Measurement(metric="selection_scores", value=sum(scored_in_all(choice(size), 0, length))),
            axes={"length": length, "queries per choice": size},
        )
        for arm, choice in CHOICES.items()
        for size in (BLOCK, 1)
        for length in COUNTED
    ]


def opened() -> list[Reading]:
    """The same of a search by bounds, whose number no closed form tells: as counted on random inputs, where bounds lie
    close together and it opens most of the tree.
    """
    import torch

    from bench.block_attention import inputs, tree
    from dsv3.attention.select import hierarchical

    readings = []
    for length in OPENED:
        given = inputs(length, torch.float32, heads=1)
        for size in (BLOCK, 1):
            scored = hierarchical(given.q, given.k, vary(tree("best_first"), block_q=size)).cost.scored
            found = Measurement(metric="selection_scores", value=scored)
            axes: dict[str, Value] = {"length": length, "queries per choice": size}
            readings.append(Reading(arm="best_first", measurement=found, axes=axes))
    return readings


def unions() -> list[Reading]:
    """Bytes that a key-value head hands out to blocks of queries, where a block chooses as one or token by token, and
    where its query heads are one or several that choose apart.
    """
    from bench.block_attention import union_bytes

    readings = []
    for length in JOINED:
        for size in (BLOCK, 1):
            for heads in SHARING:
                axes = {"length": length, "queries per choice": size, "query heads per key-value head": heads}
                choices = {"sdpa": None} | {arm: choice(size) for arm, choice in CHOICES.items()}
                for arm, choice in choices.items():
                    counted = Measurement(metric="union_bytes", value=union_bytes(choice, length, heads))
                    readings.append(Reading(arm=arm, measurement=counted, axes=axes))
    return readings


def million(cell: Cell) -> list[Reading]:
    """Wall and CPU time of one head's forward pass in which every token chooses for itself, and the last token's error.

    The last query sees what the reference computes on its selection; the whole could not be checked in a day.
    """
    import torch

    from bench.block_attention import last_query_error, per_token
    from bench.meters.paired import process_clock

    torch.set_num_threads(int(cell.axes["threads"]))
    start = process_clock()
    given, selection, out = per_token(int(cell.axes["length"]))
    end = process_clock()
    error = last_query_error(given, selection, out)
    if error > 1e-5:
        return [Reading(arm="hierarchical", metric="wall_seconds", failed=f"the last query differs by {error:.2g}")]
    axes = {"phase": "forward"}
    return [
        Reading(arm="hierarchical", measurement=Measurement(metric=name, value=value), axes=axes)
        for name, value in (("wall_seconds", end.wall - start.wall), ("cpu_seconds", end.cpu - start.cpu))
    ]


def times(cell: Cell) -> list[Reading]:
    """Times of every arm that agrees with the reference, and once, bytes."""
    import torch

    from bench import block_attention
    from bench.meters.ceiling import gemm_rate

    torch.set_num_threads(int(cell.axes["threads"]))
    length = int(cell.axes["length"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[str(cell.axes["dtype"])]
    given = block_attention.inputs(length, dtype, seed=cell.seed or 0)
    arms, readings = [], []
    for arm in block_attention.arms(dtype, "forward"):
        if arm == "flex" and length != FLEX:
            continue
        if missing := block_attention.why_not(arm, given):
            readings.append(Reading(arm=arm, metric="forward_cpu_ratio", pending=missing))
            continue
        try:
            block_attention.check(arm, given)
            arms.append(arm)
        except AssertionError as error:
            readings.append(Reading(arm=arm, metric="forward_cpu_ratio", failed=str(error)))
    ceilings = {form: gemm_rate(torch.device("cpu"), form, which="cpu").value for form in {dtype, torch.float32}}
    readings += [row for phase in PHASES for row in _timed(cell, arms, given, phase, ceilings)]
    if cell.seed == 0 and length <= TRACED:
        readings += _bytes(arms, length, dtype)
    return readings


def _timed(
    cell: Cell, arms: Sequence[str], given: "Inputs", phase: str, ceilings: Mapping["torch.dtype", float]
) -> list[Reading]:
    """Seconds of each arm, its ratio to SDPA, its products' share of what a matrix product reaches in its format and,
    of the forward pass, the part that goes into choosing.
    """
    from bench import block_attention
    from bench.meters.paired import over_blocks, process_clock, ratios, summary, time_block
    from bench.speed import rate

    call = {"forward": block_attention.inference, "forward_backward": block_attention.training}[phase]
    able = [arm for arm in arms if phase == "forward" or arm not in block_attention.FORWARD_ONLY]
    calls: dict[str, Callable[[], object]] = {arm: partial(call, arm, given) for arm in able}
    choosing = {arm: f"{arm}, choosing" for arm in able if arm in CHOOSING and phase == "forward"}
    calls |= {name: partial(block_attention.choose, arm, given) for arm, name in choosing.items()}
    # processes begin with different arms, since a process of long calls has few blocks in which the order could turn
    first = 2 * (cell.seed or 0)
    taken = [time_block(calls, first + block, 1, process_clock) for block in range(blocks(int(cell.axes["length"])))]
    readings = []
    for arm in able:
        seconds, *others = summary(taken, arm, BASELINE, phase, ("cpu",))
        at_ceiling = ceilings[block_attention.attended(arm, given)[0].dtype]
        least = block_attention.operations(arm, given, phase) / at_ceiling
        timed = (seconds, rate(seconds, "ceiling_share", least))
        readings += [Reading(arm=arm, measurement=row, axes={"phase": phase}) for row in timed]
        readings += [Reading(arm=arm, measurement=row) for row in others]
    for arm, name in choosing.items():
        share = over_blocks("selection_cpu_share", ratios(taken, name, arm, "cpu"))
        readings.append(Reading(arm=arm, measurement=share))
    return readings


def _bytes(arms: Sequence[str], length: int, dtype: Any) -> list[Reading]:
    """Peak bytes of both phases, inputs apart."""
    from bench import block_attention
    from bench.meters.memory import peak_bytes

    readings = []
    for phase, call in zip(PHASES, (block_attention.inference, block_attention.training), strict=True):
        for arm in arms:
            if phase == "forward_backward" and arm in block_attention.FORWARD_ONLY:
                continue
            peak = peak_bytes(lambda: block_attention.inputs(length, dtype), partial(call, arm))[0]
            readings.append(Reading(arm=arm, measurement=peak, axes={"phase": phase}))
    return readings


def answer(records: Sequence[Record]) -> str:
    """The tree against SDPA at the longest sequence measured, and in what that splits; its rivals; its memory."""
    lengths = [int(row.axes["length"]) for row in records if row.metric == "forward_cpu_ratio" and row.error is None]
    if not lengths:
        raise NoEvidence("no forward pass was timed")
    longest = max(lengths)
    parts = [_split(records, phase, longest) for phase in PHASES]
    share = estimate(records, arm="hierarchical", metric="selection_cpu_share", length=longest, dtype="fp32")
    said = f"At {longest} tokens in fp32 the tree makes {'; '.join(parts)}. Choosing is {share} of the forward pass."
    more = (_rivals(records, longest), _slopes(records, sorted(set(lengths))), _bounds(records), _memory(records))
    return " ".join((said, *(sentence for found in more for sentence in found)))


def _split(records: Sequence[Record], phase: str, length: int) -> str:
    """How many times as fast as SDPA the tree is: by the kernel's dense form, and from there on by the choice."""
    words = {"forward": "a forward pass", "forward_backward": "forward and backward"}[phase]
    tree, dense = (_faster(records, arm, phase, length) for arm in ("hierarchical", "dense"))
    where: dict[str, str | int] = {"length": length, "dtype": "fp32"}
    metric = f"{phase}_cpu_ratio"
    chosen = compare(records, arm="dense", baseline="hierarchical", metric=metric, ratio=True, **where)
    return f"{words} {tree} times as fast as SDPA: the kernel's dense form {dense} times, and the choice {chosen} times"


def _rivals(records: Sequence[Record], length: int) -> list[str]:
    """The forward pass of those that choose otherwise, or for nothing."""
    with suppress(NoEvidence):
        window, flat = (_faster(records, arm, "forward", length) for arm in ("window", "blocks"))
        return [f"Forward, a window of as many keys is {window} times as fast as SDPA, the flat choice {flat} times."]
    return []


def _slopes(records: Sequence[Record], lengths: Sequence[int]) -> list[str]:
    with suppress(NoEvidence):
        tree, dense = (_growth(records, arm, lengths) for arm in ("hierarchical", "sdpa"))
        return [f"From {lengths[0]} tokens on its time grows as n to the {tree}, that of SDPA to the {dense}."]
    return []


def _bounds(records: Sequence[Record]) -> list[str]:
    """What a search by bounds takes on random inputs, against all blocks."""
    metric = "selection_scores"
    counted = [int(row.axes["length"]) for row in records if (row.arm, row.metric) == ("best_first", metric)]
    with suppress(NoEvidence):
        where: dict[str, Value] = {"length": max(counted, default=0), "queries per choice": 1}
        times = compare(records, arm="best_first", baseline="blocks", metric=metric, ratio=True, **where)
        return [
            f"At {where['length']} tokens, each choosing for itself, a search by bounds takes {times} times the scores "
            "of the flat choice on random inputs, where bounds lie close together."
        ]
    return []


def _memory(records: Sequence[Record]) -> list[str]:
    """The tree's peak against SDPA's where both were counted on the longest sequence."""
    metric, phase = "peak_bytes", "forward_backward"
    counted = [int(row.axes["length"]) for row in records if (row.metric, row.arm) == (metric, "hierarchical")]
    with suppress(NoEvidence):
        where: dict[str, str | int] = {"phase": phase, "length": max(counted, default=0), "dtype": "fp32"}
        share = compare(records, arm="hierarchical", baseline="sdpa", metric=metric, ratio=True, **where)
        return [
            f"At {where['length']} tokens forward and backward take {share} of SDPA's peak bytes beyond the inputs."
        ]
    return []


def _growth(records: Sequence[Record], arm: str, lengths: Sequence[int]) -> Estimate:
    where: dict[str, str | int] = {"phase": "forward", "dtype": "fp32", "part": "time"}
    return exponent({n: replicates(records, arm=arm, metric="cpu_seconds", length=n, **where) for n in lengths})


def _faster(records: Sequence[Record], arm: str, phase: str, length: int) -> Estimate:
    ratio = estimate(records, arm=arm, metric=f"{phase}_cpu_ratio", length=length, dtype="fp32")
    return ratio.map(lambda share: 1 / share)


def _figures() -> tuple[Figure, ...]:
    ratios = tuple(
        Figure(
            f"{phase}_{dtype}",
            f"{words} time against SDPA in {dtype}, one thread: below 1 is faster",
            metric=f"{phase}_cpu_ratio",
            x="length",
            where={"dtype": dtype},
            log="xy",
        )
        for dtype in ("fp32", "bf16")
        for phase, words in zip(PHASES, ("Forward", "Forward and backward"), strict=True)
    )
    share = Figure(
        "choosing",
        "Share of the forward pass that goes into choosing, fp32",
        metric="selection_cpu_share",
        x="length",
        where={"dtype": "fp32"},
        log="x",
    )
    memory = Figure(
        "memory",
        "Peak bytes of forward and backward in fp32, beyond the inputs",
        metric="peak_bytes",
        x="length",
        where={"phase": "forward_backward", "dtype": "fp32"},
        log="xy",
    )
    counted = Figure("scores", "Scores per token that choosing takes: the tree's grow as log n", draw=scores)
    return (*ratios, Figure("growth", "How forward time grows with length", draw=growth), counted, share, memory)


STUDY = Study(
    name="attention_hierarchical",
    question="How much faster is attention to blocks found down a tree, and does the tree earn its keep?",
    arms=tuple(Arm(name, words) for name, words in BLOCK_ARMS.items()),
    baseline=BASELINE,
    metrics=(
        "forward_cpu_ratio",
        "forward_backward_cpu_ratio",
        "cpu_seconds",
        "ceiling_share",
        "wall_seconds",
        "selection_cpu_share",
        "selection_scores",
        "union_bytes",
        "peak_bytes",
    ),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    figures=_figures(),
    answer=answer,
    limits=(
        "Attention alone: a model's projections and experts grow with n and dilute every ratio.",
        "Inputs are random, and so are the chosen blocks: real ones lie closer together, in nearer caches.",
        "What a choice costs in quality is not asked here.",
        "torch's bf16 attention is slow on processors without bf16 matrix tiles: sdpa_fp32 is the fairer peer there.",
        "FlexAttention has no backward pass on a CPU and is timed at one length.",
    ),
)
