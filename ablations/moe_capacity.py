"""What a capacity factor drops, wastes, costs and saves, on routing that a model really makes and on perfect balance.

The article's layer (128 experts, top-2, softmax, its auxiliary loss) in a small model, trained once per factor from the
same weights on the same text. Early is the first tenth of the steps, late the last tenth; balanced is the trained model
with routers replaced by one that is perfectly balanced. A fixed factor c gives every expert ceil(N K / E c) slots:

    drop share          assignments refused / assignments; its floor is what uniformly random routing loses there
    empty slot share    slots that no token takes / slots; 1 - 1/c at perfect balance

Without capacity four ways of balancing are trained too, since what a factor drops is decided by the balance before it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ablations.claims import Claim, Outcome, Verdict
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, decide, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Rule, Study, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import (
    Balance,
    Config,
    Dropless,
    Fixed,
    MultiHead,
    SignBias,
    SwitchLoss,
    digest,
    presets,
    vary,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dsv3.data.prepare import Prepared
    from dsv3.train.state import TrainState
    from dsv3.train.step import StepReport

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
FACTORS = (1.0, 1.1, 1.2, 1.25, 1.5, 2.0)
CLAIMED = "factor_1.2"
BALANCES: Mapping[str, tuple[Balance, ...]] = {
    "no_loss": (),
    "switch_loss": (SwitchLoss(alpha=0.01),),
    "sign_bias": (SignBias(rate=0.001),),
}
LENGTH = 128
HELD_OUT = 32
BLOCKS = 5
SLOTS_WASTED_AT_BALANCE = 1 - 1 / 1.2


def base() -> Config:
    """The article's experts and loss in two layers, with plain attention: its sparse one is another study's."""
    return vary(
        presets.article_small(),
        **{
            "model.num_hidden_layers": 2,
            "model.attention": MultiHead(num_attention_heads=4, head_dim=32),
            "model.moe.capacity": Dropless(),
            "train.sequence_length": LENGTH,
            "train.eval_sequences": HELD_OUT,
            "train.optimizer.lr": 1e-3,
        },
    )


def named(factor: float) -> str:
    """The arm of a capacity factor."""
    return f"factor_{factor:g}"


CONFIGS: Mapping[str, Config] = {
    "dropless": base(),
    **{named(factor): vary(base(), **{"model.moe.capacity": Fixed(factor=factor)}) for factor in FACTORS},
    **{name: vary(base(), **{"model.moe.balance": balance}) for name, balance in BALANCES.items()},
}
TIMED = tuple(name for name in CONFIGS if name not in BALANCES)


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A cell per seed: every arm trained one after the other, then their steps timed in alternated blocks."""
    steps, tokens, seconds = {"quick": (16, 512, 25), "full": (120, 2048, 240)}[profile]
    return grid(seeds=range(SEEDS[profile]), seconds=seconds, steps=(steps,), tokens=(tokens,))


def measure(cell: Cell) -> list[Reading]:
    """Routing early and late, the held-out loss, and on the trained models bytes and time of a step."""
    from bench.meters.paired import threads
    from dsv3.data.prepare import prepare

    prepared = prepare(base().data, base().model.vocab_size)
    trained = dict[str, _Trained]()
    with threads(1):  # products of a few rows gain nothing from a second thread
        for name in CONFIGS:
            trained[name] = _train(sized(name, cell), cell, prepared)
            # The same weights, and nothing drops at inference: before the first step all arms are one model.
            assert trained[name].untrained == trained["dropless"].untrained, f"{name} starts as another model"
        readings = [reading for name in CONFIGS for reading in _losses(name, trained, prepared.digest)]
        return readings + _costs({name: trained[name].state for name in TIMED}, cell, prepared)


def sized(name: str, cell: Cell) -> Config:
    """An arm's config at the cell's number of steps and tokens."""
    rows = int(cell.axes["tokens"]) // LENGTH
    return vary(CONFIGS[name], **{"train.steps": cell.axes["steps"], "train.batch_size": rows})


@dataclass(frozen=True)
class _Trained:
    """A trained model, what its steps reported, and its held-out loss before and after."""

    state: "TrainState"
    reports: "Sequence[StepReport]"
    untrained: float
    loss: float


def _train(config: Config, cell: Cell, prepared: "Prepared") -> _Trained:
    from bench.training import train
    from dsv3.train import TrainState

    assert cell.seed is not None, "every cell of this study has a seed"
    state = TrainState.create(config, seed=cell.seed, device=cell.device)
    untrained = _loss(state, prepared)
    reports = train(state, prepared, cell.seed)
    return _Trained(state, reports, untrained, _loss(state, prepared))


def _loss(state: "TrainState", prepared: "Prepared") -> float:
    """Nats per held-out token, nothing dropped."""
    from dsv3.train.evaluate import HeldOut, evaluate

    train = state.config.train
    heldout = HeldOut.of(prepared, prepared.validation, length=LENGTH, count=HELD_OUT)
    found = evaluate(state.model, heldout, step=state.step, batch_size=train.batch_size, precision=train.precision)
    return found.nats_per_token


def _losses(name: str, trained: "Mapping[str, _Trained]", corpus: str) -> list[Reading]:
    """The held-out loss, its gap to dropless, and the routing of the first and of the last steps."""
    config, mine = trained[name].state.config, trained[name]
    loss = {"loss": mine.loss} | ({} if name == "dropless" else {"loss_gap": mine.loss - trained["dropless"].loss})
    part = max(1, len(mine.reports) // 10)
    windows = {"early": mine.reports[:part], "late": mine.reports[-part:]}
    found = [({}, loss), *(({"routing": when}, routing(config, steps)) for when, steps in windows.items())]
    return [
        Reading(
            arm=name,
            measurement=Measurement(metric=metric, value=value),
            axes=axes,
            config=digest(config),
            corpus=corpus,
        )
        for axes, figures in found
        for metric, value in figures.items()
    ]


def routing(config: Config, reports: "Sequence[StepReport]") -> dict[str, float]:
    """Balance and drops, means over the steps and layers reported."""
    from dsv3.moe import drop_floor, expert_capacity, max_vio_floor

    moe, train = config.model.moe, config.train
    assert moe is not None, "every arm has experts"
    experts, k, tokens = moe.n_routed_experts, moe.num_experts_per_tok, train.batch_size * train.sequence_length
    max_vio = fmean(fmean(report.max_vio) for report in reports)
    found = {"max_vio": max_vio, "excess_max_vio": max_vio / max_vio_floor(experts, k, tokens)}
    if isinstance(moe.capacity, Fixed):
        capacity = expert_capacity(tokens, moe, moe.capacity.factor)
        dropped = fmean(report.dropped for report in reports)
        found["drop_share"] = dropped
        found["drop_floor"] = drop_floor(experts, k, tokens, capacity)
        found["empty_slot_share"] = 1 - tokens * k * (1 - dropped) / (experts * capacity)
    return found


def _costs(states: "Mapping[str, TrainState]", cell: Cell, prepared: "Prepared") -> list[Reading]:
    """Bytes kept for backward, and CPU time of a step: as the trained routers route, and in perfect balance."""
    from bench.forced_balance import forced_balance
    from dsv3.data.pack import Batches

    assert cell.seed is not None, "every cell of this study has a seed"
    rows = Batches(prepared.validation, int(cell.axes["tokens"]) // LENGTH, LENGTH, cell.seed).next()
    readings = _cost(states, rows, "late")
    with ExitStack() as stack:
        for state in states.values():
            stack.enter_context(forced_balance(state.model, cell.seed))
        return readings + _cost(states, rows, "balanced")


def _cost(states: "Mapping[str, TrainState]", rows: "Tensor", routed: str) -> list[Reading]:
    from bench.meters.paired import plan, process_clock, summary, time_block
    from bench.meters.saved import saved_bytes
    from bench.speed import rate
    from dsv3.train.step import train_step

    arms: dict[str, Callable[[], StepReport]] = {
        name: partial(train_step, state, rows) for name, state in states.items()
    }
    planned = plan(arms, least=BLOCKS, seconds=0.0)
    blocks = [time_block(arms, at, planned.calls, process_clock) for at in range(planned.blocks)]
    readings = list[Reading]()
    for name, state in states.items():
        found = summary(blocks, name, "dropless", "step")
        found += (rate(found[1], "tokens_per_second", rows[:, 1:].numel()),)
        found += (saved_bytes(partial(state.model, rows[:, :-1]), state.model.parameters()),)
        if routed == "balanced" and name != "dropless":
            figures = routing(state.config, [train_step(state, rows)])
            found += tuple(
                Measurement(metric=metric, value=figures[metric]) for metric in ("drop_share", "empty_slot_share")
            )
        readings += [Reading(arm=name, measurement=one, axes={"routing": routed}) for one in found]
    return readings


def keeps_experts_from_overload(claim: Claim, records: Sequence[Record]) -> Verdict:
    """B1: how far the busiest expert's excess is from chance late in training, with the loss and without any."""
    found = _late(records, "dropless", "excess_max_vio")
    without = _late(records, "no_loss", "excess_max_vio")
    others = {name: _late(records, name, "excess_max_vio") for name in ("switch_loss", "sign_bias")}
    words = (
        f"Late in training the busiest expert exceeds the mean by {found} times what uniformly random routing gives, "
        f"with the article's loss; without any by {without}, with the Switch loss at the same alpha by "
        f"{others['switch_loss']}, with DeepSeek's bias by {others['sign_bias']}."
    )
    assert claim.margin is not None, "the claim has a margin"
    verdict, unaided = (decide(excess, words, at_most=1 + claim.margin) for excess in (found, without))
    if verdict.outcome == unaided.outcome == Outcome.HOLDS:
        return replace(verdict, outcome=Outcome.UNDECIDABLE, answer=f"{words} Nothing was overloaded without it.")
    return verdict


def keeps_capacity_without_waste(claim: Claim, records: Sequence[Record]) -> Verdict:
    """B2: late in training, the share of assignments that find no slot and the share of slots that find none."""
    dropped, empty = (_late(records, CLAIMED, metric) for metric in ("drop_share", "empty_slot_share"))
    floor = _late(records, CLAIMED, "drop_floor")
    words = (
        f"At factor 1.2 experts drop {_percent(dropped)} of the assignments late in training, where uniformly random "
        f"routing would drop {_percent(floor)}, and leave {_percent(empty)} of their slots empty; in perfect balance "
        f"they would drop none and leave {SLOTS_WASTED_AT_BALANCE:.0%} empty."
    )
    assert claim.margin is not None, "the claim has a margin"
    return decide(max(dropped, empty, key=lambda share: share.value), words, at_most=claim.margin)


def answer(records: Sequence[Record]) -> str:
    """Drops early, late and at chance; what a factor buys and costs."""
    steps = _steps(records)
    drops = ", ".join(
        f"{factor:g}: {_percent(_late(records, named(factor), 'drop_share'))}"
        f" (chance {_percent(_late(records, named(factor), 'drop_floor'))})"
        for factor in FACTORS
    )
    gap, ratio = (_at(records, CLAIMED, "loss_gap"), _late(records, CLAIMED, "step_cpu_ratio"))
    balanced = estimate(records, arm=CLAIMED, metric="step_cpu_ratio", steps=steps, routing="balanced")
    return (
        f"Share of assignments dropped late in {steps} steps, by factor: {drops}. Factor 1.2 changes the held-out loss "
        f"by {gap} nat/token and a step's CPU time to {ratio} of dropless as the trained router routes, to {balanced} "
        "in perfect balance. How much a factor drops is the balance's doing: chance explains the rest."
    )


def _late(records: Sequence[Record], arm: str, metric: str) -> Estimate:
    return _at(records, arm, metric, routing="late")


def _at(records: Sequence[Record], arm: str, metric: str, **where: Any) -> Estimate:
    """At the longest training that was run."""
    return estimate(records, arm=arm, metric=metric, steps=_steps(records), **where)


def _steps(records: Sequence[Record]) -> int:
    steps = [int(record.axes["steps"]) for record in records if "steps" in record.axes]
    if not steps:
        raise NoEvidence("nothing was trained")
    return max(steps)


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.2g}%"


def _drawn(metric: str, caption: str) -> Figure:
    return Figure(metric, caption, metric=metric, kind="interval", where={"routing": "late"})


STUDY = Study(
    name="moe_capacity",
    question="What does a capacity factor drop, waste, cost and save?",
    arms=(
        Arm("dropless", "every token reaches its experts; the article's loss, alpha 0.01", config=CONFIGS["dropless"]),
        *(
            Arm(named(factor), f"{factor:g} x mean load, least probable dropped", config=CONFIGS[named(factor)])
            for factor in FACTORS
        ),
        Arm("no_loss", "dropless, no balance loss", CONFIGS["no_loss"]),
        Arm("switch_loss", "dropless, Switch loss, alpha 0.01", CONFIGS["switch_loss"]),
        Arm("sign_bias", "dropless, DeepSeek's bias at rate 0.001, no loss", CONFIGS["sign_bias"]),
    ),
    baseline="dropless",
    metrics=(
        "drop_share",
        "drop_floor",
        "empty_slot_share",
        "max_vio",
        "excess_max_vio",
        "loss_gap",
        "loss",
        "step_cpu_ratio",
        "saved_bytes",
        "tokens_per_second",
        "cpu_seconds",
        "step_wall_ratio",
        "wall_seconds",
    ),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    compared=(
        Compared(
            "loss",
            margin=0.01,
            why="1% of perplexity; ways of balancing differ by 0.6% of it at 1 billion parameters "
            "(arXiv:2408.15664, table 2)",
        ),
    ),
    configs={name: sized(name, cells("full")[0]) for name in CONFIGS},
    rules=(
        Rule("B1", seeds=6, judge=keeps_experts_from_overload),
        Rule("B2", seeds=6, judge=keeps_capacity_without_waste),
    ),
    figures=(
        _drawn("drop_share", "Assignments dropped late in training"),
        _drawn("excess_max_vio", "MaxVio late in training, as a multiple of chance"),
        Figure("loss_gap", "Held-out loss minus dropless', same seed and text", metric="loss_gap", kind="interval"),
        _drawn("step_cpu_ratio", "CPU time of a training step against dropless, as the trained router routes"),
    ),
    answer=answer,
    limits=(
        "A short training of a small model, two layers of experts: a router that had billions of tokens to settle is "
        "better balanced, and then drops less.",
        "Few tokens per expert: chance alone drops more than at the batch sizes of a large run, as the floor says.",
        "Speed is that of one process that holds all experts, where a full expert delays nobody but itself; across "
        "machines the fullest one sets the pace, which this does not measure.",
        "Dropping by probability, as the article has it, is not causal: the losses compare training, evaluation is "
        "dropless.",
    ),
)
