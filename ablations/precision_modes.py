"""What each precision costs in accuracy, and what it buys in time where the machine really has it.

Three looks at each mode. Training: the same tiny model, text and seed in every mode; the held-out loss against fp32's,
beside what moving every initial weight by one rounding step of fp32 does, which is the floor of any such gap. Operands:
activations, weights and gradients of every product of the fp32 run after its last step, quantised as each mode would:
SQNR, overflow, underflow, error of small values. Speed: whole training steps, arms interleaved, only in formats that
the machine multiplies in its own instructions; fp8 is emulated, so its time would say nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ablations.claims import Claim, Verdict
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, decide, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Rule, Study, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import BFloat16, Config, Float8Block, Float16, Float32, Precision, presets, vary

if TYPE_CHECKING:
    from torch import Tensor

    from bench.meters.operands import Kind
    from dsv3.data.prepare import Prepared
    from dsv3.precision import Counts, Recipe
    from dsv3.train import TrainState
    from dsv3.train.evaluate import HeldOut

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
FP8 = {"fp8": Float8Block(), "fp8_ue8m0": Float8Block(scale="ue8m0")}
TRAINED: Mapping[str, Precision] = {
    "fp32": Float32(),
    "fp32_nudged": Float32(),
    "bf16": BFloat16(),
    "fp16": Float16(),
    **FP8,
}
REDUCED = tuple(name for name, precision in TRAINED.items() if precision != Float32())
LENGTH = 64
HELD_OUT = 32
TIMED_LENGTH = 256
BLOCKS = 3
CLAIMED_WIDTH = 384  # the small preset


def _dense() -> Config:
    """Wide enough that a step is nearly all matrix products."""
    wide = {"model.hidden_size": 1024, "model.intermediate_size": 4096, "model.num_hidden_layers": 2}
    dense = {"model.moe": None, "model.mtp": None, "model.first_k_dense_replace": 0}
    return vary(presets.small(), **wide, **dense)


SIZES: Mapping[int, Callable[[], Config]] = {128: presets.tiny, CLAIMED_WIDTH: presets.small, 1024: _dense}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per seed a cell that trains every mode, and cells that time steps: CPU time at 1 thread, wall time at 2."""
    steps, tokens, seconds = {"quick": (8, 128, 15), "full": (100, 512, 200)}[profile]
    widths = {"quick": (CLAIMED_WIDTH,), "full": tuple(SIZES)}[profile]
    threads = {"quick": (1,), "full": (1, 2)}[profile]
    seeds = range(SEEDS[profile])
    training = grid(seeds=seeds, seconds=seconds, timed=False, look=("training",), steps=(steps,), tokens=(tokens,))
    return training + grid(seeds=seeds, seconds=15, look=("speed",), width=widths, tokens=(512,), threads=threads)


def trained(precision: Precision) -> Config:
    """The training run of the full profile in that precision."""
    rows = {"train.batch_size": 512 // LENGTH, "train.sequence_length": LENGTH, "train.eval_sequences": HELD_OUT}
    return vary(presets.tiny(), **rows, **{"train.steps": 100, "train.precision": precision})


def measure(cell: Cell) -> list[Reading]:
    """The look that the cell asks for."""
    return _speed(cell) if cell.axes["look"] == "speed" else _training(cell)


def _training(cell: Cell) -> list[Reading]:
    import torch

    from dsv3.config import digest
    from dsv3.data.prepare import prepare
    from dsv3.train.evaluate import HeldOut

    torch.set_num_threads(1)  # sums have one order whatever the cores
    base = vary(
        presets.tiny(),
        **{
            "train.steps": cell.axes["steps"],
            "train.batch_size": int(cell.axes["tokens"]) // LENGTH,
            "train.sequence_length": LENGTH,
            "train.eval_sequences": HELD_OUT,
        },
    )
    prepared = prepare(base.data, base.model.vocab_size)
    heldout = HeldOut.of(prepared, prepared.validation, length=LENGTH, count=HELD_OUT)
    readings, losses = list[Reading](), dict[str, float]()
    for name, precision in TRAINED.items():
        config = vary(base, **{"train.precision": precision})
        labels: dict[str, Any] = {"config": digest(config), "corpus": prepared.digest}
        try:
            state, skipped = _train(name, config, cell, prepared)
            losses[name] = _loss(state, heldout)
        except (FloatingPointError, ValueError) as error:
            readings.append(Reading(arm=name, metric="loss", failed=str(error), **labels))
            continue
        found = {"loss": losses[name], "skipped_steps": skipped}
        if name != "fp32" and "fp32" in losses:
            found["loss_gap"] = losses[name] - losses["fp32"]
        readings += [Reading(arm=name, measurement=Measurement(metric=m, value=v), **labels) for m, v in found.items()]
        if name == "fp32":
            rows = heldout.rows[: config.train.batch_size].to(state.device)
            readings += [replace(reading, **labels) for reading in _operands(state, rows)]
    return readings


def _train(name: str, config: Config, cell: Cell, prepared: "Prepared") -> "tuple[TrainState, float]":
    """The state after the last step, and the share of steps that were skipped."""
    from bench.training import train
    from dsv3.train import TrainState

    assert cell.seed is not None, "every cell of this study has a seed"
    state = TrainState.create(config, seed=cell.seed, device=cell.device)
    if name == "fp32_nudged":
        _nudge(state, cell.seed)
    skipped = [report.health != "ok" for report in train(state, prepared, cell.seed)]
    return state, sum(skipped) / len(skipped)


def _nudge(state: "TrainState", seed: int) -> None:
    """Move every weight by one step of fp32, up or down at random."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in state.model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            end = torch.where(up, math.inf, -math.inf).to(parameter)
            parameter.copy_(parameter.nextafter(end))


def _loss(state: "TrainState", heldout: "HeldOut") -> float:
    """Nats per held-out token.

    Raises:
        FloatingPointError: when it is not finite.
    """
    from dsv3.train.evaluate import evaluate

    # all rows at once: the emulated products of fp8 cost most per call
    rows, precision = len(heldout.rows), state.config.train.precision
    loss = evaluate(state.model, heldout, step=state.step, batch_size=rows, precision=precision).nats_per_token
    if not math.isfinite(loss):
        raise FloatingPointError(f"the held-out loss is {loss} after {state.step} steps")
    return loss


def _recipes(kind: "Kind") -> "dict[str, tuple[Recipe, float]]":
    """What each mode does to an operand of that kind: the recipe, and the factor that loss scaling puts before it."""
    from dsv3.precision import BF16, FP16, Recipe, recipes
    from dsv3.precision.block_scale import PUBLISHED_FLOOR

    found = {name: (getattr(recipes(precision), kind), 1.0) for name, precision in FP8.items()}
    tiled = found["fp8"][0]
    found["fp8_tensor"] = replace(tiled, tile=(None, None)), 1.0
    found["bf16"] = Recipe(format=BF16, scale="none"), 1.0
    found["fp16"] = Recipe(format=FP16, scale="none"), Float16().init_scale if kind == "gradient" else 1.0
    if kind == "gradient":
        found["fp16_unscaled"] = found["fp16"][0], 1.0
        found["fp8_floor"] = replace(tiled, floor=PUBLISHED_FLOOR), 1.0
    return found


def _operands(state: "TrainState", rows: "Tensor") -> list[Reading]:
    """Counts over all operands of one step on `rows`, and over all kinds together."""
    from bench.meters.operands import operands
    from dsv3.parallel import ALONE
    from dsv3.precision import count
    from dsv3.precision.linear import KEPT
    from dsv3.train.loss import loss_parts

    found: dict[tuple[str, str], Counts] = {}

    def on_operand(_: str, kind: "Kind", matrix: "Tensor") -> None:
        for arm, (recipe, factor) in _recipes(kind).items():
            counts = count(matrix * factor, recipe)
            for key in ((arm, kind), (arm, "all")) if arm in REDUCED else ((arm, kind),):
                found[key] = found[key] + counts if key in found else counts

    with operands(state.model, KEPT, on_operand):
        loss_parts(state.model(rows[:, :-1]), rows, state.config, ALONE.mean)["total"].backward()
    state.optimizer.zero_grad(set_to_none=True)
    return [
        Reading(arm=arm, measurement=Measurement(metric=metric, value=value), axes={"operand": kind})
        for (arm, kind), counts in found.items()
        for metric, value in _shares(counts, everything=kind == "all").items()
    ]


def _shares(counts: "Counts", *, everything: bool) -> dict[str, float]:
    if everything:
        return {"overflow_share": counts.overflow_share}
    return {
        "overflow_share": counts.overflow_share,
        "underflow_share": counts.underflow_share,
        "sqnr": counts.sqnr_db,
        "small_value_error": counts.small_value_error,
    }


def _speed(cell: Cell) -> list[Reading]:
    """Steps of fp32 and of every mode that the machine really has, in alternated blocks; why not, for the others."""
    from bench.meters.paired import cuda_clock, paired_ratios, process_clock, threads
    from bench.native import why_no_speed
    from bench.training import step_on_random_tokens

    assert cell.seed is not None, "every cell of this study has a seed"
    reasons = {name: why_no_speed(TRAINED[name], cell.device) for name in ("fp32", *REDUCED)}
    rows = {"train.batch_size": int(cell.axes["tokens"]) // TIMED_LENGTH, "train.sequence_length": TIMED_LENGTH}
    config = vary(SIZES[int(cell.axes["width"])](), **rows)
    arms = {
        name: step_on_random_tokens(vary(config, **{"train.precision": TRAINED[name]}), cell.seed, cell.device)
        for name, why in reasons.items()
        if why is None
    }
    # Waiting for the other core counts as wall time only, so CPU time decides where one thread does all.
    hand = "cpu" if cell.device == "cpu" and cell.axes["threads"] == 1 else "wall"
    with threads(int(cell.axes["threads"])):
        _check(arms)
        clock = process_clock if cell.device == "cpu" else cuda_clock
        found = paired_ratios(arms, baseline="fp32", phase="step", blocks=BLOCKS, clock=clock)
    readings = [Reading(arm=name, measurement=one) for name in arms for one in found[name] if hand in one.metric]
    ratio = f"step_{hand}_ratio"
    return readings + [Reading(arm=name, metric=ratio, pending=why) for name, why in reasons.items() if why is not None]


def _check(arms: Mapping[str, Callable[[], float]]) -> None:
    """The first loss of every arm is fp32's, as far as its format goes; that of an untrained model is near ln V."""
    from dsv3.precision import named

    exact = arms["fp32"]()
    for name, step in arms.items():
        loss, eps = (exact if name == "fp32" else step()), named(name).eps
        assert abs(loss - exact) <= eps * exact, f"{name}: first loss {loss}, fp32 has {exact}"


def fastest_step(claim: Claim, records: Sequence[Record]) -> Verdict:
    """F1: how many times as fast a step is in the fastest real mode, at the small model."""
    found = {name: speed for name in REDUCED if (speed := _speedup(records, name)) is not None}
    if not found:
        raise NoEvidence("no reduced precision is real on this machine, or none was timed")
    best = max(found, key=lambda name: found[name].value)
    words = (
        f"A training step of the small model is {found[best]} times as fast in {best}, the fastest format that this "
        "machine multiplies itself, as in fp32."
    )
    return decide(found[best], words, at_least=claim.least)


def overflow_share(claim: Claim, records: Sequence[Record]) -> Verdict:
    """F2: elements beyond fp16's largest number, the format of the claim."""
    fp16, fp8 = (_at_the_end(records, name, "overflow_share", operand="all") for name in ("fp16", "fp8"))
    skipped = _at_the_end(records, "fp16", "skipped_steps")
    words = (
        f"Of all operands {_percent(fp16)} overflow in fp16 under loss scaling, which skipped {_percent(skipped)} of "
        f"the steps, and {_percent(fp8)} in fp8, where each tile is scaled by its own maximum. Underflow is the risk "
        "that is left: see the table."
    )
    return decide(fp16, words, at_most=claim.most)


def answer(records: Sequence[Record]) -> str:
    """Accuracy, what is lost of gradients, speed."""
    gaps = ", ".join(f"{name} {_at_the_end(records, name, 'loss_gap')}" for name in REDUCED)
    floor = _at_the_end(records, "fp32_nudged", "loss_gap")
    lost = {
        name: _percent(_at_the_end(records, name, "underflow_share", operand="gradient"))
        for name in ("fp8", "fp8_floor", "fp8_tensor", "fp16", "fp16_unscaled")
    }
    speed = _speedup(records, "bf16")
    return (
        f"After {_steps(records)} steps the held-out loss less fp32's is, in nat/token: {gaps}; moving every initial "
        f"weight by one rounding step of fp32 changes it by {floor}. Of the gradients' elements fp8 turns "
        f"{lost['fp8']} to zero with a scale per tile, {lost['fp8_floor']} if tiles keep the floor published for "
        f"activations, {lost['fp8_tensor']} with one scale per tensor; fp16 {lost['fp16']} with loss scaling and "
        f"{lost['fp16_unscaled']} without. "
        + (
            "bf16 was not timed here."
            if speed is None
            else f"A bf16 step is {speed} times as fast as an fp32 one here."
        )
    )


def _speedup(records: Sequence[Record], arm: str) -> Estimate | None:
    """fp32's time over the arm's, at the small model: CPU time at one thread, or wall time on a GPU; None if it was
    not timed.
    """
    on_gpu = any(record.axes.get("device") == "cuda" for record in records)
    metric = "step_wall_ratio" if on_gpu else "step_cpu_ratio"
    try:
        ratio = estimate(records, arm=arm, metric=metric, width=CLAIMED_WIDTH, threads=1)
    except NoEvidence:
        return None
    return ratio.map(lambda share: 1 / share)


def _at_the_end(records: Sequence[Record], arm: str, metric: str, **where: Any) -> Estimate:
    """At the longest training that was run."""
    return estimate(records, arm=arm, metric=metric, steps=_steps(records), **where)


def _steps(records: Sequence[Record]) -> int:
    steps = [int(record.axes["steps"]) for record in records if "steps" in record.axes]
    if not steps:
        raise NoEvidence("nothing was trained")
    return max(steps)


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.2g}%"


STUDY = Study(
    name="precision_modes",
    question="What does each precision cost in accuracy, and what does it buy in time?",
    arms=(
        Arm("fp32", "every product in fp32"),
        Arm("fp32_nudged", "fp32, each initial weight moved by one rounding step: the floor of any gap"),
        Arm("bf16", "products in bf16 by autocast"),
        Arm("fp16", "products in fp16 by autocast, dynamic loss scaling"),
        Arm("fp8", "linear layers and experts on e4m3 codes, scales per 1 x 128 tile and 128 x 128 block; emulated"),
        Arm("fp8_ue8m0", "the same with scales rounded up to powers of two; emulated"),
        Arm("fp8_floor", "fp8 whose gradient tiles keep the 1e-4 floor of activations; counted, not trained"),
        Arm("fp8_tensor", "e4m3 with one scale per tensor; counted, not trained"),
        Arm("fp16_unscaled", "fp16 gradients without loss scaling; counted, not trained"),
    ),
    baseline="fp32",
    metrics=(
        "loss_gap",
        "loss",
        "skipped_steps",
        "underflow_share",
        "small_value_error",
        "sqnr",
        "overflow_share",
        "step_cpu_ratio",
        "step_wall_ratio",
        "cpu_seconds",
        "wall_seconds",
    ),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    compared=(
        Compared(
            "loss",
            margin=0.0125,
            why="0.25% of 5 nat, the relative error that DeepSeek-V3 states for FP8 (arXiv:2412.19437, section 3.3)",
            where={"look": "training"},
            arms=tuple(TRAINED)[1:],
        ),
    ),
    configs={name: trained(precision) for name, precision in TRAINED.items()},
    rules=(Rule("F1", seeds=6, judge=fastest_step), Rule("F2", seeds=6, judge=overflow_share)),
    figures=(
        Figure("loss_gap", "Held-out loss minus fp32's, same seed and text", metric="loss_gap", kind="interval"),
        Figure(
            "gradient_underflow",
            "Elements of gradients that become zero",
            metric="underflow_share",
            kind="interval",
            where={"operand": "gradient"},
        ),
        Figure(
            "step_time",
            "CPU time of a training step against fp32, by width of the model",
            metric="step_cpu_ratio",
            kind="interval",
            where={"threads": 1},
            reference=(1 / 2.8, "claimed: 2.8 times as fast"),
        ),
    ),
    answer=answer,
    limits=(
        "A short training of a tiny model: gaps that build up over billions of tokens do not show here.",
        "fp8 is emulated: codes, scales and roundings are real, the 14-bit sums inside Hopper's tensor cores are not; "
        "embedding, head, router, norms and attention scores stay in fp32.",
        "Operands are those of one held-out batch after the fp32 run, in the tiles of forward and dgrad.",
        "The loss scale of fp16 starts at 65536 and doubles after 2000 good steps, which these runs do not reach. At "
        "its limit one step in 2001 is skipped, whatever the model.",
        "Timed steps use random tokens and 512 of them: fewer per expert than a real run has.",
    ),
)
