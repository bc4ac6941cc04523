"""From which length selected attention pays, in time and in memory, and how its cost grows.

One layer's attention without its projections (`bench.attention`): 4 heads of width 64, batch 1, fp32, random inputs.
The peer is torch's fused kernel, dense attention in its best form; eager attention, which writes the matrix of weights
out, stands beside it because many published ratios are taken against that. Selecting is always inside the time. Every
cell first compares each arm with the float64 reference, values and gradients; an arm that differs has no figures.

Keeping a share of n keys leaves n^2 pairs times that share, whatever selects them; keeping a number of keys leaves n
pairs times that number. The exponents say which of the two a clock sees.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.claims import Claim, Verdict
from ablations.evidence import Estimate, NoEvidence, compare, decide, estimate, mean, replicates
from ablations.study import Arm, Cell, Figure, Reading, Rule, Study, grid
from bench.attention_sizes import ARMS, HEADS, KEEP, KEYS
from bench.measurement import Measurement
from bench.record import Profile, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

    from bench.attention import Inputs

FITTED = (1024, 2048, 4096, 8192, 16384)  # tokens over which an exponent is read
LENGTHS: Mapping[Profile, tuple[int, ...]] = {"quick": (1024, 4096), "full": FITTED}
SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
CLAIMED = 16384  # tokens at which the article gives its figures
EAGER = 2048  # tokens up to which eager attention is timed: its share of a block would be most of the study
BLOCKS = 3
SHARE = "per_head_share"
PHASES = ("forward", "forward_backward")


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A process per length and seed, at one thread: a second one waits, and what it waits for is the machine's."""
    return tuple(
        cell
        for seed in range(SEEDS[profile])
        for length in LENGTHS[profile]
        for cell in grid(seconds=6 + length / 250, seeds=(seed,), length=(length,), threads=(1,))
    )


def measure(cell: Cell) -> list[Reading]:
    """Times of every arm that agrees with the reference; counts too, once."""
    import torch

    from bench.attention import check, inputs

    length = int(cell.axes["length"])
    torch.set_num_threads(int(cell.axes["threads"]))
    given = inputs(length, cell.device, seed=cell.seed or 0)
    arms, readings = [], []
    for arm in ARMS:
        if arm == "eager" and (missing := _missing(length)):
            readings.append(Reading(arm=arm, metric="peak_bytes", pending=missing))
            continue
        try:
            check(arm, given)
            arms.append(arm)
        except AssertionError as error:
            readings.append(Reading(arm=arm, metric="forward_cpu_ratio", failed=str(error)))
    return readings + _times(cell, arms, given) + (_counts(cell, arms, given) if cell.seed == 0 else [])


def _missing(length: int) -> str:
    """Why eager attention cannot run at this length, or nothing; training holds up to six of its matrices at once."""
    needed, free = 6 * HEADS * length**2 * 4, _free_bytes()
    return "" if needed < free else f"needs {needed / 2**30:.0f} GiB for its matrices, {free / 2**30:.0f} GiB are free"


def _free_bytes() -> int:
    """Memory that a process may take without swapping; all there is, where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _calls() -> dict[str, Callable[[str, "Inputs"], Any]]:
    from bench.attention import inference, training

    return dict(zip(PHASES, (inference, training), strict=True))


def _times(cell: Cell, arms: Sequence[str], given: "Inputs") -> list[Reading]:
    """Per phase, seconds of each arm and its ratio to SDPA; in forward, the part of them that goes into choosing."""
    from bench.attention import choose
    from bench.meters.paired import over_blocks, process_clock, ratios, summary, time_block

    length = int(cell.axes["length"])
    timed = [arm for arm in arms if arm != "eager" or length <= EAGER]
    readings = []
    for phase, call in _calls().items():
        calls: dict[str, Callable[[], object]] = {arm: partial(call, arm, given) for arm in timed}
        choosing = {arm: f"{arm}, choosing" for arm in timed if arm.startswith("per_head") and phase == "forward"}
        calls |= {name: partial(choose, arm, given) for arm, name in choosing.items()}
        if phase == "forward":
            time_block(calls, 0, 1, process_clock)  # warms up
        blocks = [time_block(calls, block, 1, process_clock) for block in range(BLOCKS)]
        for arm in timed:
            for row in summary(blocks, arm, "sdpa", phase, ("cpu",)):
                axes = {"phase": phase} if row.metric.endswith("_seconds") else {}
                readings.append(Reading(arm=arm, measurement=row, axes=axes))
        for arm, name in choosing.items():
            share = over_blocks("selection_cpu_share", ratios(blocks, name, arm, "cpu"))
            readings.append(Reading(arm=arm, measurement=share))
    return readings


def _counts(cell: Cell, arms: Sequence[str], given: "Inputs") -> list[Reading]:
    """Peak bytes of forward and of training, and the share of pairs that the selection keeps."""
    from bench.attention import choose, inputs
    from bench.meters.memory import peak_bytes

    length, readings = int(cell.axes["length"]), []
    for arm in arms:
        for phase, call in _calls().items():
            peak = peak_bytes(lambda: inputs(length, cell.device), partial(call, arm), device=cell.device)[0]
            readings.append(Reading(arm=arm, measurement=peak, axes={"phase": phase}))
        selection, visible = choose(arm, given), HEADS * length * (length + 1) // 2
        kept = visible if selection is None else selection.cost.kept * HEADS // selection.indices.shape[1]
        readings.append(Reading(arm=arm, measurement=Measurement(metric="selection_share", value=kept / visible)))
    return readings


def grows_like_n_log_n(claim: Claim, records: Sequence[Record]) -> Verdict:
    """A1: the exponent of the article's own setting, per process; the words set the others beside it."""
    time = {arm: exponent(records, arm, FITTED) for arm in ARMS if arm != "eager"}
    answer = (
        f"Keeping {KEEP} of the visible keys, time grows as n to the {time[SHARE]}: a fixed share of n^2 is n^2. With "
        f"{KEYS} keys per head it grows as n to the {time['per_head_number']}, with a window of as many to the "
        f"{time['window']}, dense to the {time['sdpa']}; n log n would be {claim.value:g}."
    )
    return decide(time[SHARE], answer, at_most=claim.most)


def exponent(records: Sequence[Record], arm: str, lengths: Sequence[int]) -> Estimate:
    """The slope of log(forward CPU time) over log(length) by least squares, fitted in each seed and averaged.

    Raises:
        NoEvidence: some seed lacks some length.
    """
    import numpy as np

    seconds = [
        replicates(records, arm=arm, metric="cpu_seconds", phase="forward", threads=1, length=length)
        for length in lengths
    ]
    seeds = set.intersection(*(set(rows) for rows in seconds))
    times = [[float(rows[seed].value or 0.0) for rows in seconds] for seed in sorted(seeds, key=str)]
    return mean([float(np.polyfit(np.log(lengths), np.log(row), 1)[0]) for row in times])


def memory_falls(claim: Claim, records: Sequence[Record]) -> Verdict:
    """A2: peak bytes of training against SDPA; the words set the eager form, if it ran, beside it."""
    saved = _saved(records, "sdpa", CLAIMED)
    longest = max(int(row.axes["length"]) for row in records if (row.arm, row.metric) == ("eager", "peak_bytes"))
    answer = (
        f"Against SDPA it takes {-saved.value:+.0%} memory at 16K tokens: fused dense attention holds no matrix that a "
        f"selection could shrink. Against eager attention, which does, it saves {_saved(records, 'eager', longest)} of "
        f"the bytes at {longest} tokens."
    )
    return decide(saved, answer, at_least=claim.least)


def inference_is_faster(claim: Claim, records: Sequence[Record]) -> Verdict:
    """A3: forward CPU time of SDPA over that of the article's setting."""
    faster = _ratio(records, SHARE, "forward", CLAIMED).map(lambda ratio: 1 / ratio)
    number = _ratio(records, "per_head_number", "forward", CLAIMED).map(lambda ratio: 1 / ratio)
    bound = 1 / estimate(records, arm=SHARE, metric="selection_share", length=CLAIMED).value
    answer = (
        f"A forward pass is {faster} times as fast as SDPA at 16K tokens, where the pairs left would allow "
        f"{bound:.2f}; with {KEYS} keys per head instead of a share of {KEEP}, {number} times."
    )
    return decide(faster, answer, at_least=claim.least)


def answer(records: Sequence[Record]) -> str:
    """Each arm against SDPA at the longest sequence measured, and from which length it is faster."""
    lengths = sorted({int(row.axes["length"]) for row in records if row.metric == "forward_cpu_ratio"})
    said = []
    for arm in (arm for arm in ARMS if arm not in ("sdpa", "eager")):
        there = [_ratio(records, arm, phase, lengths[-1]).value for phase in ("forward", "forward_backward")]
        pays = [length for length in lengths if _ratio(records, arm, "forward_backward", length).value < 1]
        since = f"from {min(pays)} tokens on" if pays else "at no length measured"
        said.append(f"{arm} takes {there[0]:.2f} of SDPA's time (training {there[1]:.2f}, faster {since})")
    return f"At {lengths[-1]} tokens " + "; ".join(said) + "."


def _ratio(records: Sequence[Record], arm: str, phase: str, length: int) -> Estimate:
    return estimate(records, arm=arm, metric=f"{phase}_cpu_ratio", length=length, threads=1)


def _saved(records: Sequence[Record], dense: str, length: int) -> Estimate:
    where: dict[str, str | int] = {"phase": "forward_backward", "length": length}
    ratio = compare(records, arm=SHARE, baseline=dense, metric="peak_bytes", ratio=True, **where)
    return ratio.map(lambda share: 1 - share)


def growth(table: Any) -> "Picture":
    """Forward seconds against length on logarithmic scales, each line with its slope."""
    import numpy as np
    from matplotlib import rcParams
    from matplotlib.figure import Figure as Picture

    rows = table[(table["metric"] == "cpu_seconds") & (table["phase"] == "forward") & (table["threads"] == 1)]
    if rows.empty:
        raise NoEvidence("no record of forward cpu_seconds at one thread yet")
    picture = Picture(figsize=(6.4, 3.4), layout="constrained")
    axes = picture.subplots()
    for arm in ARMS:
        line = rows[rows["arm"] == arm].sort_values("length")
        if len(line) > 1:
            slope = np.polyfit(np.log(line["length"].astype(float)), np.log(line["value"]), 1)[0]
            # The baseline is drawn as in the other figures, which leaves each arm the colour that it has there.
            ink = {"color": rcParams["text.color"], "linestyle": "--"} if arm == STUDY.baseline else {}
            axes.plot(line["length"], line["value"], marker="o", label=f"{arm}: n^{slope:.2f}", **ink)
    ticks = sorted({int(length) for length in rows["length"]})
    axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="seconds of CPU time, one thread")
    axes.set_title("How forward time grows with length")
    axes.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(visible=True, which="major")
    picture.legend(loc="outside right center", title="slope of the line", alignment="left")
    return picture


STUDY = Study(
    name="attention_sparsity",
    question="From which length does selected attention pay, in time and in memory, and how does its cost grow?",
    arms=tuple(Arm(name, words) for name, words in ARMS.items()),
    baseline="sdpa",
    metrics=(
        "forward_cpu_ratio",
        "forward_backward_cpu_ratio",
        "cpu_seconds",
        "selection_cpu_share",
        "selection_share",
        "peak_bytes",
    ),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    rules=(
        Rule("A1", seeds=6, judge=grows_like_n_log_n),
        Rule("A2", seeds=0, judge=memory_falls),
        Rule("A3", seeds=6, judge=inference_is_faster),
    ),
    figures=(
        Figure(
            "forward",
            "Forward time against SDPA, one thread: below 1 is faster",
            metric="forward_cpu_ratio",
            x="length",
            log="xy",
            reference=(1 / 2.3, "claimed at 16K: 1/2.3"),
        ),
        Figure(
            "training",
            "Forward and backward time against SDPA, one thread",
            metric="forward_backward_cpu_ratio",
            x="length",
            log="xy",
        ),
        Figure(
            "memory",
            "Peak bytes of forward and backward, beyond the inputs",
            metric="peak_bytes",
            x="length",
            where={"phase": "forward_backward"},
            log="xy",
        ),
        Figure(
            "kept",
            "Share of visible pairs that a selection keeps: a share stays, a number fades",
            metric="selection_share",
            x="length",
            log="xy",
        ),
        Figure("growth", "How forward time grows with length: a straight line of slope 2 is n^2", draw=growth),
    ),
    answer=answer,
    limits=(
        "Attention alone: a model's projections and experts grow with n and dilute every ratio.",
        "Inputs are random. Time does not depend on them; whether a model loses quality is not asked here.",
        "Selected attention runs in plain PyTorch around torch's fused kernel on gathered blocks; a kernel of its own "
        "would move the crossing to shorter sequences, not the exponents.",
        "An exponent is that of a finite range, from 1024 tokens to the longest: fixed costs pull it down.",
        f"Eager attention is timed up to {EAGER} tokens, and its bytes are counted as far as its matrices fit.",
        "The quick profile stops at 4096 tokens and two processes: it shows the shape, and decides no claim.",
    ),
)
