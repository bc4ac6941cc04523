"""From which length V3.2's sparse attention (DSA) costs less than the dense latent attention it replaced.

DSA scores all pairs with small heads and attends to the best `index_topk` keys of each token (arXiv 2512.02556 section
2; `dsv3.attention.select.indexer`). Per layer, of n tokens with H heads of `macs` multiply-adds a pair and J index
heads of width W:

    dense   n^2/2 H macs             DSA   n topk H macs + n^2/2 J (W + 1) + the indexer's own projections

Both are quadratic; DSA's constant is smaller. What `macs` is depends on the form. Expanded, a head has keys of its
own. Absorbed, all heads share the latent, which costs 3.4 times as much a pair at DeepSeek's size; DeepSeek computes
DSA so, since there a gathered row of the cache serves 128 heads, and computes short prompts expanded, under a mask. So
there are two crossings of a prefill, and both are shown. Decoding is absorbed on either side.

Counts are of DeepSeek's own sizes, closed forms of `dsv3.model.cost`. Times are those of a layer of a seventh of the
width (`bench.indexed_attention`), of this project's code: torch's fused kernel where attention is dense, ours where it
is not, and plain products for the scores. DeepSeek's kernels are for GPUs and score in fp8.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod

from ablations.evidence import NoEvidence, estimate
from ablations.study import Arm, Cell, Figure, Reading, Study, grid
from bench.measurement import Measurement
from bench.record import Profile, Record
from dsv3.config import Indexer, Latent, Model, presets, vary
from dsv3.model.cost import forward_flops, index_flops, kept_pairs, macs_per_pair, parameter_shapes

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
LENGTHS: Mapping[Profile, tuple[int, ...]] = {"quick": (1024,), "full": (1024, 2048, 4096, 8192)}
COUNTED = tuple(2**power for power in range(10, 18))
LONGEST = 2**17  # tokens up to which a crossing is looked for
BLOCKS: Mapping[str, int] = {"forward": 3, "decode": 7}
BYTES = 2  # of a cached number, bf16
PHASES: Mapping[str, tuple[str, ...]] = {
    "prefill": ("dense", "indexer", "indexer_absorbed"),
    "decode": ("dense", "indexer_absorbed"),
}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Counts once; a process per length and seed at one thread."""
    timed = tuple(
        cell
        for seed in range(SEEDS[profile])
        for length in LENGTHS[profile]
        for cell in grid(seconds=6 + 1e-6 * length**2, seeds=(seed,), part=("time",), length=(length,), threads=(1,))
    )
    return grid(seconds=4, timed=False, part=("counts",)) + timed


def measure(cell: Cell) -> list[Reading]:
    """Counts of DeepSeek's sizes, or times of a small layer."""
    return counts() if cell.axes["part"] == "counts" else times(cell)


def counts() -> list[Reading]:
    """FLOPs and bytes per token of one layer's attention, its projections included, and where the lines cross."""
    readings = []
    for phase, arms in PHASES.items():
        for arm in arms:
            for length in COUNTED:
                axes = {"length": length, "phase": phase}
                found = Measurement(metric="flops_per_token", value=flops_per_token(arm, phase, length))
                readings.append(Reading(arm=arm, measurement=found, axes=axes))
            if arm != "dense":
                found = Measurement(metric="crossover_length", value=crossing(partial(_saves, arm, phase)))
                readings.append(Reading(arm=arm, measurement=found, axes={"phase": phase}))
    for arm in PHASES["decode"]:
        for length in COUNTED:
            found = Measurement(metric="read_bytes", value=read_bytes(arm, length))
            readings.append(Reading(arm=arm, measurement=found, axes={"length": length, "phase": "decode"}))
    return readings


def model(arm: str) -> Model:
    """One layer of DeepSeek-V3, or of V3.2."""
    made = presets.deepseek_v3() if arm == "dense" else presets.deepseek_v32()
    return vary(made.model, num_hidden_layers=1, first_k_dense_replace=1, mtp=None)


def flops_per_token(arm: str, phase: str, length: int) -> float:
    """FLOPs of the attention of one layer: per token of a prompt, or of the token that comes last."""
    layer = model(arm)
    attention = layer.attention
    assert isinstance(attention, Latent), "both models have latent attention"
    prefix, absorbed = "layers.0.self_attn.", arm == "indexer_absorbed"
    if phase == "prefill":
        parts = {name: value for name, value in forward_flops(layer, length).items() if name.startswith(prefix)}
        # absorbing moves kv_b_proj from each key to each query: as many products, of which there are as many
        parts[f"{prefix}scores"] = (
            2 * kept_pairs(attention.select, length) * macs_per_pair(attention, absorbed=absorbed)
        )
        return sum(parts.values()) / length
    weights = {name: shape for name, shape in parameter_shapes(layer).items() if name.startswith(prefix)}
    seen = min(length, attention.select.index_topk) if isinstance(attention.select, Indexer) else length
    chosen = index_flops(attention.select, length, length) if isinstance(attention.select, Indexer) else 0
    products = sum(prod(shape) for shape in weights.values() if len(shape) > 1)
    return 2 * (products + seen * macs_per_pair(attention, absorbed=True)) + chosen


def read_bytes(arm: str, length: int) -> int:
    """Bytes of one layer's cache that a decoded token reads: latents and rotary keys, and the indexer's keys."""
    attention = model(arm).attention
    assert isinstance(attention, Latent), "both models have latent attention"
    row = attention.kv_lora_rank + attention.qk_rope_head_dim
    if not isinstance(attention.select, Indexer) or length <= attention.select.index_topk:
        return BYTES * length * row
    return BYTES * (attention.select.index_topk * row + length * attention.select.index_head_dim)


def crossing(saves: Callable[[int], bool]) -> int:
    """The first length at which it saves, of what from there on always does; by halving.

    Raises:
        NoEvidence: it does not up to `LONGEST`.
    """
    if not saves(LONGEST):
        raise NoEvidence(f"nothing is saved up to {LONGEST} tokens")
    low, high = 1, LONGEST
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saves(middle) else (middle + 1, high)
    return high


def _saves(arm: str, phase: str, length: int) -> bool:
    return flops_per_token(arm, phase, length) < flops_per_token("dense", phase, length)


def times(cell: Cell) -> list[Reading]:
    """Both phases of every arm that agrees with its other form and with dense attention where nothing is left out."""
    import torch

    from bench import indexed_attention as indexed
    from bench.meters.paired import process_clock, summary, time_block

    torch.set_num_threads(int(cell.axes["threads"]))
    length, readings = int(cell.axes["length"]), []
    arms: list[str] = []
    for arm in PHASES["prefill"]:
        try:
            indexed.check(arm)
            arms.append(arm)
        except AssertionError as error:
            readings.append(Reading(arm=arm, metric="forward_cpu_ratio", failed=str(error)))
    for phase, metric in (("prefill", "forward"), ("decode", "decode")):
        calls = {arm: indexed.call(arm, phase, length, seed=cell.seed or 0) for arm in PHASES[phase] if arm in arms}
        time_block(calls, 0, 1, process_clock)  # warms up
        blocks = [time_block(calls, block, 1, process_clock) for block in range(BLOCKS[metric])]
        for arm in calls:
            for row in summary(blocks, arm, "dense", metric, ("cpu",)):
                axes = {"phase": metric} if row.metric.endswith("_seconds") else {}
                readings.append(Reading(arm=arm, measurement=row, axes=axes))
    return readings


def answer(records: Sequence[Record]) -> str:
    """Where the lines cross at DeepSeek's size, and what a clock says of the small layer."""
    cross = {
        (arm, phase): estimate(records, arm=arm, metric="crossover_length", phase=phase)
        for phase, arms in PHASES.items()
        for arm in arms[1:]
    }
    said = (
        "By FLOPs of one layer at DeepSeek's size, DSA costs less than dense MLA in a prefill from "
        f"{cross['indexer', 'prefill']} tokens on if both are expanded, from {cross['indexer_absorbed', 'prefill']} on "
        "if DSA is absorbed, as DeepSeek computes it; a decoded token from "
        f"{cross['indexer_absorbed', 'decode']} on."
    )
    lengths = [int(row.axes["length"]) for row in records if row.metric == "forward_cpu_ratio" and row.error is None]
    if not lengths:
        return said
    ratio = partial(estimate, records, length=max(lengths), threads=1)
    prefill = ratio(arm="indexer_absorbed", metric="forward_cpu_ratio")
    decode = ratio(arm="indexer_absorbed", metric="decode_cpu_ratio")
    crossed = (
        f"{words} {_cheaper(records, arm, metric)}"
        for words, arm, metric in (
            ("an expanded prefill", "indexer", "forward_cpu_ratio"),
            ("an absorbed one", "indexer_absorbed", "forward_cpu_ratio"),
            ("a decoded token", "indexer_absorbed", "decode_cpu_ratio"),
        )
    )
    return (
        f"{said} By CPU time of the small layer here, DSA costs less than dense MLA at these lengths measured: "
        f"{'; '.join(crossed)}. At {max(lengths)} tokens the prefill takes {prefill} of the dense one's CPU time, a "
        f"decoded token {decode}."
    )


def _cheaper(records: Sequence[Record], arm: str, metric: str) -> str:
    """From which of the measured lengths on the whole interval of the arm's time lies below dense attention's."""
    lengths = sorted({int(row.axes["length"]) for row in records if (row.arm, row.metric) == (arm, metric)})
    above = [0]
    for length in lengths:
        high = estimate(records, arm=arm, metric=metric, length=length, threads=1).high
        above += [length] if high is None or high >= 1 else []
    since = [length for length in lengths if length > above[-1]]
    if not since:
        return f"shown at none up to {lengths[-1]} tokens"
    return f"from {since[0]} tokens on{f', not shown at {above[-1]} tokens' if above[-1] else ''}"


STUDY = Study(
    name="attention_indexer",
    question="From which length does V3.2's sparse attention cost less than dense latent attention?",
    arms=(
        Arm("dense", "MLA, every key; expanded in a prefill, absorbed in decoding"),
        Arm("indexer", "DSA, expanded: every head has keys of its own"),
        Arm("indexer_absorbed", "DSA, absorbed: all heads share the latents of the selected keys"),
    ),
    baseline="dense",
    metrics=(
        "flops_per_token",
        "crossover_length",
        "read_bytes",
        "forward_cpu_ratio",
        "decode_cpu_ratio",
        "cpu_seconds",
    ),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    figures=(
        Figure(
            "prefill",
            "FLOPs per token of a prompt, one layer's attention at DeepSeek's size",
            metric="flops_per_token",
            x="length",
            where={"phase": "prefill"},
            log="xy",
        ),
        Figure(
            "decode",
            "FLOPs of a decoded token, one layer's attention at DeepSeek's size",
            metric="flops_per_token",
            x="length",
            where={"phase": "decode"},
            log="xy",
        ),
        Figure(
            "read",
            "Bytes of one layer's cache that a decoded token reads, bf16",
            metric="read_bytes",
            x="length",
            log="xy",
        ),
        Figure(
            "forward_time",
            "Time of a prefill against dense MLA, small layer, one thread: below 1 is faster",
            metric="forward_cpu_ratio",
            x="length",
            log="xy",
        ),
        Figure(
            "decode_time",
            "Time of a decoded token against dense MLA, small layer, one thread: below 1 is faster",
            metric="decode_cpu_ratio",
            x="length",
            log="xy",
        ),
    ),
    answer=answer,
    limits=(
        "FLOPs of scores in fp8 count as those of attention in bf16; where fp8 is twice as fast, lines cross earlier.",
        "Times are those of this project's kernel on a CPU, query by query, not of DeepSeek's kernels.",
        "Weights and inputs are random, and so are the selected keys; what selecting costs in quality is not asked.",
        "An indexer's training is not in these figures: its loss scores every pair that attention keeps.",
    ),
)
