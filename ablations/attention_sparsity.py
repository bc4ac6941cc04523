"""From which length selected attention pays, in time and in memory, and how its cost grows.

One layer's attention without its projections (`bench.attention`): 4 heads of width 64, batch 1, fp32, random inputs.
The article's sparsity of 0.3 can mean that 30% of the keys are kept or that 30% are dropped: both are arms. Three dense
forms are what they can be compared with: torch's fused kernel, the peer in its best form; this project's own kernel;
and eager attention, which writes the matrix of weights out and against which many published ratios are taken.
Selecting is always inside the time. Every cell first compares each arm with the float64 reference, values and
gradients; an arm that differs has no figures.

Keeping a share of n keys leaves n^2 pairs times that share, whatever selects them; keeping a number of keys leaves n
pairs times that number. The exponents say which of the two a clock sees.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.claims import Claim, Verdict
from ablations.evidence import Estimate, NoEvidence, compare, decide, estimate, mean, replicates
from ablations.study import Arm, Cell, Figure, Reading, Rule, Study, grid
from bench.attention_sizes import ARMS, HEADS, KEEP, KEPT, KEYS
from bench.measurement import Measurement
from bench.record import Profile, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

    from bench.attention import Inputs

FITTED = (1024, 2048, 4096, 8192, 16384)  # tokens over which an exponent is read
LENGTHS: Mapping[Profile, tuple[int, ...]] = {"quick": (1024, 2048), "full": FITTED}
SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
CLAIMED = 16384  # tokens at which the article gives its figures
EAGER = 2048  # tokens up to which training with eager attention is timed: its share would be most of the study
BLOCKS = 3
SHARE, DROPPED = "per_head_share", "per_head_dropped"
PHASES = ("forward", "forward_backward")
BESIDE = (("blocks_share", "sdpa"), (SHARE, "dense"), ("blocks_share", "dense"))  # forms of this project's kernel
MATRICES = {"forward": 3, "forward_backward": 6}  # that eager attention holds at once


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A process per length and seed, at one thread: a second one waits, and what it waits for is the machine's."""
    return tuple(
        cell
        for seed in range(SEEDS[profile])
        for length in LENGTHS[profile]
        for cell in grid(seconds=6 + length / 120, seeds=(seed,), length=(length,), threads=(1,))
    )


def measure(cell: Cell) -> list[Reading]:
    """Times of every arm that agrees with the reference; counts too, once."""
    import torch

    from bench.attention import check, inputs, why_not

    length = int(cell.axes["length"])
    torch.set_num_threads(int(cell.axes["threads"]))
    given = inputs(length, cell.device, seed=cell.seed or 0)
    arms, readings = [], []
    for arm in ARMS:
        if missing := _missing(length, "forward") if arm == "eager" else why_not(arm, given):
            readings.append(Reading(arm=arm, metric="peak_bytes", pending=missing))
            continue
        try:
            check(arm, given)
            arms.append(arm)
        except AssertionError as error:
            readings.append(Reading(arm=arm, metric="forward_cpu_ratio", failed=str(error)))
    return readings + _times(cell, arms, given) + (_counts(cell, arms, given) if cell.seed == 0 else [])


def _missing(length: int, phase: str) -> str:
    """Why eager attention cannot run at this length, or nothing."""
    needed, free = MATRICES[phase] * HEADS * length**2 * 4, _free_bytes()
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
    readings = []
    for phase, call in _calls().items():
        timed = [arm for arm in arms if arm != "eager" or phase == "forward" or length <= EAGER]
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
            if arm == "eager" and (missing := _missing(length, phase)):
                readings.append(Reading(arm=arm, metric="peak_bytes", pending=missing, axes={"phase": phase}))
                continue
            peak = peak_bytes(lambda: inputs(length, cell.device), partial(call, arm), device=cell.device)[0]
            readings.append(Reading(arm=arm, measurement=peak, axes={"phase": phase}))
        selection, visible = choose(arm, given), HEADS * length * (length + 1) // 2
        kept = visible if selection is None else selection.cost.kept * HEADS // selection.indices.shape[1]
        readings.append(Reading(arm=arm, measurement=Measurement(metric="selection_share", value=kept / visible)))
    return readings


def grows_like_n_log_n(claim: Claim, records: Sequence[Record]) -> Verdict:
    """A1: the exponent of the article's own setting, per process; the words set the others beside it."""
    time = {arm: exponent(records, arm, FITTED) for arm in (SHARE, DROPPED, "per_head_number", "window", "sdpa")}
    answer = (
        f"Keeping {KEEP} of the visible keys, time grows as n to the {time[SHARE]}, keeping {KEPT} as n to the "
        f"{time[DROPPED]}: a fixed share of n^2 is n^2. With {KEYS} keys per head it grows as n to the "
        f"{time['per_head_number']}, with a window of as many to the {time['window']}, dense to the {time['sdpa']}; "
        f"n log n would be {claim.value:g}."
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
    """A2: peak bytes of training against SDPA; the words set both readings and the other dense forms beside it."""
    saved, dropped = (_saved(records, arm, "sdpa", CLAIMED) for arm in (SHARE, DROPPED))
    longest = max(int(row.axes["length"]) for row in records if _is_eager_training(row))
    eager = [_saved(records, arm, "eager", longest) for arm in (SHARE, DROPPED)]
    answer = (
        f"Training that keeps {KEEP} of the keys takes {-saved.value:+.0%} memory against SDPA at 16K tokens, training "
        f"that keeps {KEPT} of them {-dropped.value:+.0%}: fused dense attention holds no matrix that a selection "
        f"could shrink. Against eager attention, which does, they save {eager[0]} and {eager[1]} of the bytes at "
        f"{longest} tokens."
    )
    with suppress(NoEvidence):  # where no compiler is
        kernel = _saved(records, SHARE, "dense", CLAIMED)
        answer += f" Against this project's dense kernel the first takes {-kernel.value:+.0%}."
    return decide(saved, answer, at_least=claim.least)


def _is_eager_training(row: Record) -> bool:
    return (row.arm, row.metric, row.axes.get("phase"), row.error) == ("eager", "peak_bytes", "forward_backward", None)


def inference_is_faster(claim: Claim, records: Sequence[Record]) -> Verdict:
    """A3: forward CPU time of SDPA over that of the article's setting; the words set both readings and the other dense
    forms beside it.
    """
    faster, dropped, number = (_faster(records, arm) for arm in (SHARE, DROPPED, "per_head_number"))
    kept = [estimate(records, arm=arm, metric="selection_share", length=CLAIMED).value for arm in (SHARE, DROPPED)]
    answer = (
        f"A forward pass that keeps {KEEP} of the keys is {faster} times as fast as SDPA at 16K tokens, where the "
        f"pairs left would allow {1 / kept[0]:.2f}; one that keeps {KEPT} of them {dropped} times, where they would "
        f"allow {1 / kept[1]:.2f}; with {KEYS} keys per head instead of a share, {number} times."
    )
    with suppress(NoEvidence):  # where eager attention's matrices do not fit
        answer += f" The first is {_faster(records, SHARE, 'eager')} times as fast as eager attention."
    with suppress(NoEvidence):  # where no compiler is
        blocks, kernel, ours = (_faster(records, arm, dense) for arm, dense in BESIDE)
        answer += (
            f" It is {kernel} times as fast as this project's dense kernel, which with the same share of whole blocks "
            f"is {blocks} times as fast as SDPA and {ours} times as fast as its own dense form."
        )
    return decide(faster, answer, at_least=claim.least)


def _faster(records: Sequence[Record], arm: str, dense: str = "sdpa") -> Estimate:
    """Forward CPU time of a dense form over the arm's, where the claims are made."""
    if dense == "sdpa":
        return _ratio(records, arm, "forward", CLAIMED).map(lambda ratio: 1 / ratio)
    where: dict[str, str | int] = {"phase": "forward", "length": CLAIMED, "threads": 1}
    return compare(records, arm=dense, baseline=arm, metric="cpu_seconds", ratio=True, **where)


def answer(records: Sequence[Record]) -> str:
    """Each arm against SDPA at the longest sequence measured, and from which length it is faster."""
    lengths = sorted({int(row.axes["length"]) for row in records if row.metric == "forward_cpu_ratio"})
    said = []
    for arm in (arm for arm in ARMS if arm not in ("sdpa", "dense", "eager")):
        there = [_ratio(records, arm, phase, lengths[-1]).value for phase in ("forward", "forward_backward")]
        pays = [length for length in lengths if _ratio(records, arm, "forward_backward", length).value < 1]
        since = f"from {min(pays)} tokens on" if pays else "at no length measured"
        said.append(f"{arm} takes {there[0]:.2f} of SDPA's time (training {there[1]:.2f}, faster {since})")
    return f"At {lengths[-1]} tokens " + "; ".join(said) + "."


def _ratio(records: Sequence[Record], arm: str, phase: str, length: int) -> Estimate:
    return estimate(records, arm=arm, metric=f"{phase}_cpu_ratio", length=length, threads=1)


def _saved(records: Sequence[Record], arm: str, dense: str, length: int) -> Estimate:
    where: dict[str, str | int] = {"phase": "forward_backward", "length": length}
    ratio = compare(records, arm=arm, baseline=dense, metric="peak_bytes", ratio=True, **where)
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
        "Per-head selection runs in plain PyTorch around torch's fused kernel on gathered blocks: a kernel of its own "
        "would move the crossing to shorter sequences, not the exponents.",
        "An exponent is that of a finite range, from 1024 tokens to the longest: fixed costs pull it down.",
        f"Training with eager attention is timed up to {EAGER} tokens; its forward pass and its bytes are measured as "
        "far as its matrices fit.",
        "The quick profile stops at 2048 tokens and two processes: it shows the shape, and decides no claim.",
    ),
)
