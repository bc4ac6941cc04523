"""Whether a capacity and a way of balancing act on the loss apart, or one changes what the other does.

`moe_capacity` changes one thing at a time: capacity under the article's loss, balance without capacity. But what full
experts refuse depends on the balance, so the two may interact. Here both are factors of a 2 x 2 design on that study's
small model: no capacity or 1.2 times the mean load, the article's quadratic loss or DeepSeek's bias. Not part of the
report, which has a time budget: `python -m ablations run ablations/moe_factorial.py --profile full`.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ablations.comparison import Compared
from ablations.designs import BASELINE, Factor, effects, factorial
from ablations.evidence import NoEvidence
from ablations.moe_capacity import base
from ablations.study import Cell, Figure, Profile, Reading, Study, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import Config, Dropless, Fixed, QuadraticLoss, SignBias, digest, vary

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
DESIGN = factorial(
    base(),
    Factor("capacity", "model.moe.capacity", {"dropless": Dropless(), "fixed": Fixed(factor=1.2)}),
    Factor(
        "balance",
        "model.moe.balance",
        {"quadratic_loss": (QuadraticLoss(alpha=0.01),), "sign_bias": (SignBias(rate=0.001),)},
    ),
)
CONFIGS: Mapping[str, Config] = {arm.name: arm.config for arm in DESIGN.arms}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per seed and arm a cell with one training."""
    steps, tokens, seconds = {"quick": (16, 512, 6), "full": (120, 2048, 30)}[profile]
    axes = {"steps": (steps,), "tokens": (tokens,)}
    return grid(arms=CONFIGS, seeds=range(SEEDS[profile]), seconds=seconds, timed=False, **axes)


def sized(arm: str, cell: Cell) -> Config:
    """An arm's config at the cell's number of steps and tokens."""
    rows = int(cell.axes["tokens"]) // CONFIGS[arm].train.sequence_length
    return vary(CONFIGS[arm], **{"train.steps": cell.axes["steps"], "train.batch_size": rows})


def measure(cell: Cell) -> list[Reading]:
    """The held-out loss, where nothing drops, and with a capacity what was dropped in the last tenth of the steps."""
    import torch

    from bench.training import sick_steps, train
    from dsv3.data.prepare import prepare
    from dsv3.train import TrainState
    from dsv3.train.evaluate import HeldOut, evaluate

    assert cell.arm is not None, "each arm trains in a cell of its own"
    assert cell.seed is not None, "every cell of this study has a seed"
    torch.set_num_threads(1)  # sums have one order whatever the cores
    config = sized(cell.arm, cell)
    prepared = prepare(config.data, config.model.vocab_size)
    state = TrainState.create(config, seed=cell.seed, device=cell.device)
    reports = train(state, prepared, cell.seed)
    if sick := sick_steps(reports):
        return [Reading(arm=cell.arm, metric="loss", failed=sick)]
    length, count = config.train.sequence_length, config.train.eval_sequences
    heldout = HeldOut.of(prepared, prepared.validation, length=length, count=count)
    tested = evaluate(state.model, heldout, step=state.step, batch_size=16, precision=config.train.precision)
    found = {"loss": tested.nats_per_token}
    if config.model.moe is not None and isinstance(config.model.moe.capacity, Fixed):
        found["drop_share"] = fmean(report.dropped for report in reports[-max(1, len(reports) // 10) :])
    labels: dict[str, Any] = {"config": digest(config), "corpus": prepared.digest}
    return [
        Reading(arm=cell.arm, measurement=Measurement(metric=name, value=value), **labels)
        for name, value in found.items()
    ]


def answer(records: Sequence[Record]) -> str:
    """The two effects and their interaction, at the longest training that was run."""
    steps = [int(record.axes["steps"]) for record in records if "steps" in record.axes]
    if not steps:
        raise NoEvidence("nothing was trained")
    found = effects(records, DESIGN, "loss", seeds=SEEDS["full"], steps=max(steps))
    capacity, balance, both = (effect.found for effect in found)
    return (
        f"After {max(steps)} steps a capacity changes the held-out loss by {capacity} nat/token, averaged over both "
        f"ways of balancing, and DeepSeek's bias by {balance}, averaged over both capacities. With both of them it "
        f"differs from the sum of what each does alone by {both.map(lambda half: 2 * half)}."
    )


STUDY = Study(
    name="moe_factorial",
    question="Do capacity and balance interact?",
    arms=DESIGN.arms,
    baseline=BASELINE,
    design=DESIGN,
    metrics=("loss", "drop_share"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    configs={arm: sized(arm, cells("full")[0]) for arm in CONFIGS},
    compared=(Compared("loss", margin=0.01, why="that of moe_capacity"),),
    figures=(
        Figure("loss", "Held-out loss minus the baseline's", metric="loss", kind="interval", against_baseline=True),
        Figure("drop_share", "Assignments dropped late in training", metric="drop_share", kind="interval"),
    ),
    answer=answer,
    limits=(
        "A short training of a small model: a router that had billions of tokens to settle drops less, and there is "
        "less for a balance to change.",
        "One level of each factor beside the baseline's: another capacity or another rate may interact otherwise.",
    ),
)
