"""What choosing blocks takes by itself, and how far the time of attention follows the pairs that are left.

A tree scores fewer nodes than a flat search (`attention_hierarchical` counts them), but a flat search reads its nodes
one after the other, at which a processor is at its best. So both are timed alone, in one head, for blocks of queries
and for single ones: the tree pays from where its curve crosses the other.

At one length the number of blocks seen varies, choosing inside the time. The lines beside the points are what is left
when the time of dense attention falls with the pairs: that of this project's kernel, and that of SDPA.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ablations.attention_hierarchical_pictures import by_choice
from ablations.evidence import NoEvidence, compare, estimate
from ablations.study import Arm, Cell, Figure, Reading, Study, Value, grid
from bench.attention_sizes import BLOCK, BLOCK_ARMS, SEEN
from bench.measurement import Measurement
from bench.record import Profile, Record
from dsv3.config import Blocks, Everything

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
CHOSEN: Mapping[Profile, tuple[int, ...]] = {"quick": (4096, 16384), "full": (4096, 16384, 65536, 262144)}
VARIED: Mapping[Profile, int] = {"quick": 4096, "full": 16384}  # tokens at which the number of blocks varies
NUMBERS = (4, 8, 16, 32, 64, 128)  # of blocks seen; as many as there are is dense
ARMS = ("sdpa", "dense", "blocks", "hierarchical")


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per process one cell that times choosing, and one in which the number of blocks varies."""
    each: dict[str, Any] = {"seeds": range(SEEDS[profile]), "threads": (1,)}
    return grid(seconds=40, part=("choosing",), to=(CHOSEN[profile][-1],), **each) + grid(
        seconds=40, part=("sparsity",), length=(VARIED[profile],), **each
    )


def measure(cell: Cell) -> list[Reading]:
    """Seconds of choosing, or times against SDPA by blocks seen."""
    import torch

    torch.set_num_threads(int(cell.axes["threads"]))
    return choosing(cell) if cell.axes["part"] == "choosing" else sparsity(cell)


def choosing(cell: Cell) -> list[Reading]:
    """Seconds of a flat search and of one down the tree, in one head, for blocks of queries and for single ones."""
    from bench.block_attention import searches
    from bench.meters.paired import process_clock, seconds, time_block

    seed, readings = cell.seed or 0, list[Reading]()
    lengths = [length for length in CHOSEN["full"] if length <= int(cell.axes["to"])]
    for size in (BLOCK, 1):
        for call in searches(lengths[0], size, seed).values():
            call()  # warms up
        for length in lengths:
            taken = [time_block(searches(length, size, seed), 2 * seed, max(1, 65536 // length), process_clock)]
            axes: dict[str, Value] = {"phase": "choosing", "length": length, "queries per choice": size}
            readings += [Reading(arm=arm, measurement=seconds(taken, arm, "cpu"), axes=axes) for arm in taken[0]]
    return readings


def sparsity(cell: Cell) -> list[Reading]:
    """Forward time against SDPA by how many blocks are seen, and which share of the visible pairs that is."""
    import torch

    from bench import block_attention
    from bench.meters.paired import process_clock, ratio, time_block
    from dsv3.model.cost import kept_pairs

    length = int(cell.axes["length"])
    given = block_attention.inputs(length, torch.float32, seed=cell.seed or 0)
    if missing := block_attention.why_not("dense", given):
        return [Reading(arm="hierarchical", metric="forward_cpu_ratio", pending=missing)]
    visible = kept_pairs(Everything(), length)
    seen = [number for number in NUMBERS if number < length // BLOCK]
    calls: dict[str, Callable[[], object]] = {
        arm: partial(block_attention.inference, arm, given) for arm in ("sdpa", "dense")
    }
    calls |= {str(number): partial(block_attention.seeing, number, given) for number in seen}
    taken = [time_block(calls, 2 * (cell.seed or 0) + block, 1, process_clock) for block in range(3)]
    readings = []
    for name in (*map(str, seen), "dense"):
        number = length // BLOCK if name == "dense" else int(name)
        found = (
            ratio(taken, name, "sdpa", "forward", "cpu"),
            Measurement(metric="selection_share", value=kept_pairs(Blocks(k=number), length) / visible),
        )
        arm = "dense" if name == "dense" else "hierarchical"
        readings += [Reading(arm=arm, measurement=one, axes={"blocks seen": number}) for one in found]
    return readings


def answer(records: Sequence[Record]) -> str:
    """From where the tree pays, for blocks of queries and for single ones; then what few blocks leave of the time."""
    block, token = (_pays(records, size) for size in (BLOCK, 1))
    rows = [row for row in records if row.metric == "forward_cpu_ratio" and row.arm == "hierarchical" and not row.error]
    if not rows:
        raise NoEvidence("no time by the number of blocks seen")
    least, length = min(int(row.axes["blocks seen"]) for row in rows), max(int(row.axes["length"]) for row in rows)
    where: dict[str, Value] = {"length": length, "blocks seen": least}
    time, share = (
        estimate(records, arm="hierarchical", metric=metric, **where)
        for metric in ("forward_cpu_ratio", "selection_share")
    )
    return (
        f"Choosing for a block of queries at once, the tree is faster than the flat search {block}; choosing for "
        f"each token, {token}. At {length} tokens attention to {least} blocks, {share} of the visible pairs, takes "
        f"{time} of SDPA's time."
    )


def _pays(records: Sequence[Record], size: int) -> str:
    """From where choosing down the tree takes less time than choosing among all blocks, in words."""
    where: dict[str, Value] = {"phase": "choosing", "queries per choice": size}
    lengths = sorted({int(row.axes["length"]) for row in records if row.metric == "cpu_seconds" and not row.error})
    if not lengths:
        raise NoEvidence("choosing has not been timed")
    shares = {}
    for length in lengths:
        where["length"] = length
        shares[length] = compare(
            records, arm="hierarchical", baseline="blocks", metric="cpu_seconds", ratio=True, **where
        )
    for before, length in pairwise(lengths):
        if shares[before].value > 1 >= shares[length].value:
            return f"from between {before} and {length} tokens on ({shares[before]} and {shares[length]} of its time)"
    longest = lengths[-1]
    return f"at no length that follows one at which it is slower ({shares[longest]} of its time at {longest} tokens)"


def relative(table: Any) -> "Picture":
    """Forward time against SDPA by the share of pairs that is left, beside what that share would give."""
    from matplotlib.figure import Figure as Picture

    rows = table[table["part"] == "sparsity"]
    if rows.empty:
        raise NoEvidence("no time by the number of blocks seen yet")
    length = int(rows["length"].max())
    rows = rows[rows["length"] == length].set_index(["metric", "arm", "blocks seen"])["value"]
    share, time = (rows[metric]["hierarchical"].sort_index() for metric in ("selection_share", "forward_cpu_ratio"))
    dense = rows["forward_cpu_ratio"]["dense"].iloc[0]
    picture = Picture(figsize=(6.4, 3.6), layout="constrained")
    axes = picture.subplots()
    ends = [share.min(), 1.0]
    axes.plot(share, time, marker="o", color="#009e73", label="hierarchical")
    axes.plot(1.0, dense, "s", color="#7f7f7f", label="dense, this project's kernel")
    axes.plot(ends, [dense * end for end in ends], ":", color="#7f7f7f", label="its time times the share")
    axes.plot(ends, ends, "--", color="#7f7f7f", label="SDPA's time times the share")
    for number, at in share.items():
        axes.annotate(f"{int(number)}", (at, time[number]), textcoords="offset points", xytext=(6, -9))
    axes.set(xscale="log", yscale="log", xlabel="share of visible pairs that is left", ylabel="forward time / SDPA's")
    axes.set_title(f"Time against sparsity at {length // 1024}K tokens, by blocks seen")
    axes.grid(visible=True, which="major")
    picture.legend(loc="outside right center")
    return picture


def choices(table: Any) -> "Picture":
    """Seconds of choosing against length: flat and down the tree, for blocks of queries and for single ones."""
    rows = table[(table["part"] == "choosing") & (table["metric"] == "cpu_seconds")]
    if rows.empty:
        raise NoEvidence("choosing alone has not been timed yet")
    return by_choice(rows, rows["value"], title="How long choosing takes", label="seconds of CPU time, one head")


STUDY = Study(
    name="attention_choosing",
    question="From which length is a tree faster than a flat search, and how far does time follow sparsity?",
    arms=tuple(Arm(name, BLOCK_ARMS[name]) for name in ARMS),
    baseline="sdpa",
    metrics=("cpu_seconds", "forward_cpu_ratio", "selection_share"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    figures=(
        Figure("choices", "Seconds that choosing takes: from which length the tree is faster", draw=choices),
        Figure("sparsity", "Forward time against the share of pairs that is left", draw=relative),
    ),
    answer=answer,
    limits=(
        "Inputs are random, and so are the chosen blocks: real ones lie closer together, in nearer caches.",
        f"Choosing is that of {SEEN} blocks; a wider beam moves the crossing to longer sequences.",
    ),
)
