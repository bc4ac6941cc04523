"""How fast is a layer of experts on a GPU, beside transformers' and beside dense products of cuBLAS?

Forward and backward of one layer in bf16, its routing given (`bench.expert_layers` says what the arms are), at two
shapes: that of Qwen3-30B-A3B (arXiv 2505.09388), at which the peer is asked to be beaten, and DeepSeek-V3's experts as
one of 32 ranks holds them (arXiv:2412.19437 section 3.4.1), 8 of its 256 with the rows that a batch brings, at which
what is left of the dense speed is asked.
The peer is timed as it is and compiled, the dense layer too. All arms are checked against the plainest form and timed
in one process, in turns, by wall time with the GPU's queue emptied.

Without a GPU a cell says that it is pending and measures nothing.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from ablations.attention_gpu import why_not
from ablations.evidence import Estimate, NoEvidence, mean, replicates
from ablations.study import Arm, Cell, Figure, Reading, Study, Value
from bench.record import Profile, Record

if TYPE_CHECKING:
    from bench.expert_layers import Shape

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
PUBLIC, DEEPSEEK = "public", "deepseek_v3"
SHAPES: Mapping[str, Mapping[str, int]] = {
    PUBLIC: {"tokens": 8192, "hidden": 2048, "inner": 768, "experts": 128, "k": 8},
    DEEPSEEK: {"tokens": 32768, "hidden": 7168, "inner": 2048, "experts": 8, "k": 1},
}
WORDS: Mapping[str, str] = {
    PUBLIC: "At the experts of Qwen3-30B-A3B",
    DEEPSEEK: "At DeepSeek-V3's experts on one of 32 ranks",
}
ROUTINGS = ("text", "balanced")
BLOCKS = 7  # give an interval of the median
PHASE = "forward_backward"
RATIO, SECONDS = f"{PHASE}_wall_ratio", "wall_seconds"
OURS, PEER = "triton", "transformers"
PEERS = (PEER, "transformers_compiled")
DENSE = ("dense", "dense_compiled")
ASKED: Mapping[str, float] = {PUBLIC: 1.3, DEEPSEEK: 0.8}  # times the peer's speed, and of the dense speed
CHANGES: Mapping[str, str] = {
    PEER: "DeepSeek-V3's experts there, on torch's grouped product",
    "transformers_compiled": "the same, compiled by torch",
    OURS: "this project's Triton kernel, which gathers inside its products",
    "grouped": "this project's rows sorted for torch's grouped product",
    "padded_128": "rows filled up to multiples of 128 for the grouped product, as MegaBlocks does",
    "dense": "no experts: a SwiGLU of as many FLOPs, products of cuBLAS",
    "dense_compiled": "the same, compiled by torch",
}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A process per shape and seed, which goes over the ways of routing; a quick run has the first shape alone."""
    names = tuple(SHAPES) if profile == "full" else (PUBLIC,)
    return tuple(
        Cell(arm=None, seed=seed, axes={"shape": name, "dtype": "bf16"} | dict(SHAPES[name]), seconds=90)
        for seed in range(SEEDS[profile])
        for name in names
    )


def measure(cell: Cell) -> list[Reading]:
    """Times of all arms for every way of routing, or why there are none."""
    from bench.expert_layers import Shape
    from dsv3.moe.kernels import triton_experts

    if missing := why_not(cell.device) or triton_experts.why_not(cell.device):
        return [Reading(arm=OURS, metric=RATIO, pending=missing)]
    shape = Shape(**{name: int(cell.axes[name]) for name in SHAPES[PUBLIC]})
    return [reading for routed in ROUTINGS for reading in timed(cell, shape, tuple(CHANGES), routed)]


def timed(cell: Cell, shape: "Shape", names: Sequence[str], routed: str) -> list[Reading]:
    """Seconds of each arm and its ratio to the peer's; no times where one computes something else."""
    import torch

    from bench import expert_layers
    from bench.cases import sessions
    from bench.meters.paired import plan, summary, threads, time_block

    torch.compiler.reset()  # of too many shapes it would compile none
    seed, device, axes = cell.seed or 0, torch.device(cell.device), {"routing": routed}
    build = partial(expert_layers.build, shape, torch.bfloat16, device, routed=routed, seed=seed)
    arms, truth = build(names=names), build(names=(expert_layers.TRUTH,))
    try:
        expert_layers.check(arms | truth, torch.bfloat16)
    except AssertionError as error:
        return [Reading(arm=OURS, metric=RATIO, failed=str(error), axes=axes)]
    del truth  # the memory of a layer and its gradients
    steps = {name: arm.step for name, arm in arms.items()}
    session = sessions(cell.device)[-1]  # that of wall time, on a CPU too
    with threads(session.threads):
        calls = plan(steps, least=BLOCKS, seconds=0.0, clock=session.clock).calls
        taken = [time_block(steps, 2 * seed + block, calls, session.clock) for block in range(BLOCKS)]
    found = [(arm, row) for arm in steps for row in summary(taken, arm, PEER, PHASE, session.hands)]
    return [Reading(arm=arm, measurement=row, axes=axes) for arm, row in found]


def answer(records: Sequence[Record]) -> str:
    """By shape and routing: how many times as fast as the peer at its best, and what is left of the dense speed."""
    said = []
    for name, routed in product(SHAPES, ROUTINGS):
        with suppress(NoEvidence):
            peer, dense = (against_best(records, arms, shape=name, routing=routed) for arms in (PEERS, DENSE))
            said.append(
                f"{WORDS[name]}, routed {'as text is' if routed == 'text' else 'evenly'}: our kernel is {peer} times "
                f"as fast as transformers in its faster mode{_asked(name, PUBLIC)}, and has {dense} of the speed of a "
                f"dense layer of as many FLOPs{_asked(name, DEEPSEEK)}."
            )
    if not said:
        raise NoEvidence("nothing was timed on a GPU")
    return " ".join(said)


def _asked(name: str, of: str) -> str:
    return f" ({ASKED[name]:g} asked)" if name == of else ""


def against_best(records: Sequence[Record], arms: Sequence[str], **where: Value) -> Estimate:
    """How many times as fast as the fastest of these arms our kernel is, in each process, and the mean of that.

    Raises:
        NoEvidence: no process has timed it and them.
    """
    ours, *theirs = (replicates(records, arm=arm, metric=SECONDS, **where) for arm in (OURS, *arms))
    seeds = set(ours).intersection(*theirs)
    if not seeds:
        raise NoEvidence(f"no process has timed {', '.join((OURS, *arms))}")
    return mean([min(_value(arm[seed]) for arm in theirs) / _value(ours[seed]) for seed in seeds], geometric=True)


def _value(record: Record) -> float:
    return float(record.value or 0.0)


STUDY = Study(
    name="moe_gpu",
    question="How fast is a layer of experts on a GPU, beside transformers' and beside dense products?",
    arms=tuple(Arm(name, changes) for name, changes in CHANGES.items()),
    baseline=PEER,
    metrics=(RATIO, SECONDS),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    figures=tuple(
        Figure(
            name,
            f"{words}: forward and backward time against transformers', routed as text is",
            metric=RATIO,
            kind="interval",
            where={"shape": name, "routing": "text"},
            log="x",
            reference=(1.0, "transformers"),
        )
        for name, words in WORDS.items()
    ),
    answer=answer,
    limits=(
        "One layer by itself, its routing given: no router, no attention, and no tokens from other ranks.",
        "One of 32 ranks that hold DeepSeek-V3's experts, as if every token went to one expert of this rank.",
        "The time of compiling, once a shape, is left out.",
    ),
)
