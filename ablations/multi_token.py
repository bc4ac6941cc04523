"""What multi-token prediction costs and what it does to the main head.

Two looks. Training: the same tiny model, text and seed with no, one and two modules; since weights are keyed by name,
all start from the same main model. Loss at equal tokens flatters an arm that does more work per token, so one more arm
trains without modules until it has spent the FLOPs of one module. Speed: whole training steps, arms interleaved.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ablations.claims import Claim, Verdict
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, compare, decide, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Rule, Study, grid
from ablations.traced import Count, Traced
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import MTP, Config, digest, presets, vary
from dsv3.model.cost import flops_per_token, parameters

if TYPE_CHECKING:
    from dsv3.model import Transformer
    from dsv3.train.evaluate import HeldOut

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
DEPTHS = {"none": 0, "one": 1, "two": 2, "none_longer": 0}
ARMS: Mapping[Profile, tuple[str, ...]] = {"quick": ("none", "one", "none_longer"), "full": tuple(DEPTHS)}
LENGTH = 128
BLOCKS = 5


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per seed a cell for each arm's training, and one that times the steps of all."""
    steps, tokens, seconds = {"quick": (16, 512, 6), "full": (120, 2048, 70)}[profile]
    seeds, arms, axes = range(SEEDS[profile]), ARMS[profile], {"steps": (steps,), "tokens": (tokens,)}
    deepest = max(DEPTHS[arm] for arm in arms)
    training = grid(seeds=seeds, seconds=seconds, timed=False, arms=arms, look=("training",), **axes)
    return training + grid(seeds=seeds, seconds=15, look=("speed",), tokens=(tokens,), deepest=(deepest,))


def measure(cell: Cell) -> list[Reading]:
    """The look that the cell asks for."""
    return _speed(cell) if cell.axes["look"] == "speed" else _training(cell)


def configured(arm: str, *, tokens: int, steps: int) -> Config:
    """The run of an arm: tiny with its number of modules; `none_longer` has as many more steps as one module costs."""
    base = vary(
        presets.tiny(), **{"train.batch_size": tokens // LENGTH, "train.sequence_length": LENGTH, "model.mtp": None}
    )
    depth = DEPTHS[arm]
    if depth:
        base = vary(base, **{"model.mtp": MTP(num_nextn_predict_layers=depth)})
    if arm == "none_longer":
        steps = round(steps * flops_ratio(DEPTHS["one"]))
    return vary(base, **{"train.steps": steps})


def flops_ratio(depth: int) -> float:
    """FLOPs of a step with that many modules over one without, by arithmetic."""
    model = presets.tiny().model
    deeper = vary(model, mtp=MTP(num_nextn_predict_layers=depth))
    return flops_per_token(deeper, LENGTH) / flops_per_token(model, LENGTH, mtp=False)


def _training(cell: Cell) -> list[Reading]:
    import torch

    from bench.training import sick_steps, train
    from dsv3.data.prepare import prepare
    from dsv3.train import TrainState
    from dsv3.train.evaluate import HeldOut, evaluate

    assert cell.arm is not None, "each arm trains in a cell of its own"
    assert cell.seed is not None, "every cell of this study has a seed"
    torch.set_num_threads(1)  # sums have one order whatever the cores
    tokens = int(cell.axes["tokens"])
    config = configured(cell.arm, tokens=tokens, steps=int(cell.axes["steps"]))
    prepared = prepare(config.data, config.model.vocab_size)
    state = TrainState.create(config, seed=cell.seed, device=cell.device)
    if sick := sick_steps(train(state, prepared, cell.seed)):
        return [Reading(arm=cell.arm, metric="bits_per_byte", failed=sick)]
    heldout = HeldOut.of(prepared, prepared.test, length=LENGTH, count=config.train.eval_sequences)
    tested = evaluate(state.model, heldout, step=state.step, batch_size=16, precision=config.train.precision)
    flops = config.train.steps * tokens * flops_per_token(config.model, LENGTH, training=True)
    found: list[tuple[str, float, dict[str, Any]]] = [
        ("bits_per_byte", tested.bits_per_byte, {}),
        ("flops", round(flops), {}),
        *(("mtp_acceptance", share, {"depth": m}) for m, share in enumerate(acceptance(state.model, heldout), start=1)),
    ]
    labels: dict[str, Any] = {"config": digest(config), "corpus": prepared.digest}
    return [
        Reading(arm=cell.arm, measurement=Measurement(metric=name, value=value), axes=axes, **labels)
        for name, value, axes in found
    ]


def acceptance(model: "Transformer", heldout: "HeldOut") -> list[float]:
    """Per depth: the share of held-out positions where its first guess is the main head's for the same token."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        output = model.eval()(heldout.rows[:, :-1].to(device))
    main = output.logits.argmax(-1)
    further = [logits.argmax(-1) for logits in output.mtp_logits]
    return [(guess == main[:, m:]).double().mean().item() for m, guess in enumerate(further, start=1)]


def _speed(cell: Cell) -> list[Reading]:
    """Whole steps of every depth in alternated blocks, after a check that the first main loss is the same in all."""
    from bench.cases import sessions
    from bench.meters.paired import plan, summary, threads, time_block
    from bench.training import step_on_random_tokens

    assert cell.seed is not None, "every cell of this study has a seed"
    tokens = int(cell.axes["tokens"])
    names = [name for name in ("none", "one", "two") if DEPTHS[name] <= int(cell.axes["deepest"])]
    configs = {name: configured(name, tokens=tokens, steps=1) for name in names}
    arms = {name: step_on_random_tokens(config, cell.seed, cell.device) for name, config in configs.items()}
    first = {name: step() for name, step in arms.items()}
    assert len(set(first.values())) == 1, f"modules changed the main head before any update: {first}"
    readings = [
        Reading(arm=name, measurement=Measurement(metric="parameters", value=parameters(config.model)))
        for name, config in configs.items()
    ]
    for session in sessions(cell.device):
        axes = {} if session.threads is None else {"threads": session.threads}
        with threads(session.threads):
            planned = plan(arms, least=BLOCKS, seconds=0.0, clock=session.clock)
            blocks = [time_block(arms, at, planned.calls, session.clock) for at in range(planned.blocks)]
        for name in arms:
            found = summary(blocks, name, "none", "step", session.hands)
            readings += [Reading(arm=name, measurement=one, axes=axes) for one in found]
    return readings


def main_head_gains(claim: Claim, records: Sequence[Record]) -> Verdict:
    """DS2: the main head with one module against without, same seeds and tokens."""
    assert claim.margin is not None, "the claim says how far above zero still counts"
    gap = _gap(records, "one", "none")
    words = (
        f"With one module the main head's held-out text takes {_signed(gap)} bit/byte more at equal tokens, and "
        f"{_signed(_gap(records, 'one', 'none_longer'))} against a run without that spends the same FLOPs."
    )
    return decide(gap, words, at_most=claim.margin)


def answer(records: Sequence[Record]) -> str:
    """Cost, quality at equal tokens and at equal FLOPs, agreement."""
    ratio = _time_ratio(records, "one")
    v3 = presets.deepseek_v3().model
    work = Traced(flops_ratio(1), ("ablations.multi_token.flops_ratio",))
    there = Traced(
        flops_per_token(v3, 4096) / flops_per_token(v3, 4096, mtp=False), ("dsv3.model.cost.flops_per_token",)
    )
    layers = Count(v3.num_hidden_layers, ("dsv3.config.presets.deepseek_v3",))
    agreed = estimate(records, arm="one", metric="mtp_acceptance", depth=1, steps=_steps(records))
    return (
        f"One module makes a step of the tiny model take {ratio} times as long ({work:.2f} times the FLOPs; by the "
        f"same arithmetic {there:.2f} times for DeepSeek-V3, whose {layers} layers dilute it). "
        f"After {_steps(records)} steps the main head's bits per byte differ by "
        f"{_signed(_gap(records, 'one', 'none'))} at equal tokens and by "
        f"{_signed(_gap(records, 'one', 'none_longer'))} at equal FLOPs; lower is better. The module's first guess is "
        f"the main head's at {100 * agreed.value:.0f}% of positions."
    )


def _time_ratio(records: Sequence[Record], arm: str) -> Estimate:
    """CPU time at one thread, or wall time on a GPU."""
    if any(record.axes.get("device") == "cuda" for record in records):
        return estimate(records, arm=arm, metric="step_wall_ratio")
    return estimate(records, arm=arm, metric="step_cpu_ratio", threads=1, deepest=_last(records, "deepest"))


def _gap(records: Sequence[Record], arm: str, baseline: str) -> Estimate:
    """At the longest training that was run."""
    return compare(records, arm=arm, baseline=baseline, metric="bits_per_byte", steps=_steps(records))


def _steps(records: Sequence[Record]) -> int:
    return _last(records, "steps")


def _last(records: Sequence[Record], axis: str) -> int:
    values = [int(record.axes[axis]) for record in records if axis in record.axes]
    if not values:
        raise NoEvidence(f"no record with {axis}")
    return max(values)


def _signed(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:+.4f} (n={found.n}, no interval)"
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


STUDY = Study(
    name="multi_token",
    question="What does multi-token prediction cost per step, and does the main head gain from it?",
    arms=(
        Arm("none", "the next token only"),
        Arm("one", "one module: also the token after the next, loss weight 0.3"),
        Arm("two", "two modules in a row"),
        Arm("none_longer", "the next token only, trained until it has spent the FLOPs of one module"),
    ),
    baseline="none",
    metrics=(
        "bits_per_byte",
        "step_cpu_ratio",
        "step_wall_ratio",
        "mtp_acceptance",
        "flops",
        "parameters",
        "cpu_seconds",
        "wall_seconds",
    ),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    rules=(Rule("DS2", seeds=6, judge=main_head_gains),),
    figures=(
        Figure(
            "bits_per_byte",
            "Held-out bits per byte of the main head minus the baseline's, same seed",
            metric="bits_per_byte",
            kind="interval",
            where={"look": "training"},
            against_baseline=True,
        ),
        Figure(
            "step_time",
            "CPU time of a training step against no module",
            metric="step_cpu_ratio",
            kind="interval",
            where={"threads": 1},
        ),
    ),
    answer=answer,
    compared=(
        Compared(
            "bits_per_byte",
            margin=0.01,
            why="half a percent of the 2 bit/byte or so that the tiny model needs, as in claim DS1",
            where={"look": "training"},
        ),
    ),
    configs={arm: configured(arm, tokens=2048, steps=120) for arm in DEPTHS},
    limits=(
        "A tiny model on at most a few hundred thousand tokens: the published gains are at 15.7 and 228.7 billion.",
        "The module is one of five layers and repeats the head, so its share of a step is far above that of a large "
        "model.",
        "Agreement of first guesses is not the speed-up of speculative decoding, which no study here measures.",
    ),
)
