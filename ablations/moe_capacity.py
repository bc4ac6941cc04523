"""What a capacity factor drops, wastes, costs and saves, on routing that a model really makes and on perfect balance.

The article's layer (128 experts, top-2, softmax, its auxiliary loss) in a small model, trained once per arm from the
same weights on the same text. Early is the first tenth of the steps, late the last tenth; balanced is the trained model
with routers replaced by one that is perfectly balanced. One thing changes at a time: the factor, least probable
dropped; the factor's source, a moving average of past steps' largest loads; or the policy, at two factors. A factor c
gives every expert ceil(N K / E c) slots:

    refused share       assignments that ask a full expert / assignments; rerouting drops less than it refuses
    drop share          assignments that no expert takes / assignments; its floor is what uniformly random routing loses
    empty slot share    slots that no token takes / slots; 1 - 1/c at perfect balance

The policy that drops nothing is no capacity at all: what one would have refused is counted on the dropless arm, at
every factor. Costs are those of steps on the dropless arm's weights, all capacities interleaved, so that a factor is
not credited with the routing that it led to; what it keeps for backward is counted likewise.

Without capacity three further ways of balancing are trained: what a factor drops is decided by the balance before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ablations.capacity_curves import curves
from ablations.claims import Claim, Outcome, Verdict
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, compare, decide, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Rule, Study, Value, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import (
    Adaptive,
    Balance,
    Capacity,
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
    from bench.capacity import Limited
    from dsv3.data.prepare import Prepared
    from dsv3.train.state import TrainState

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
FACTORS = (1.0, 1.1, 1.2, 1.25, 1.5, 2.0)
CLAIMED = "factor_1.2"
POLICED = (1.0, 1.2)  # factors at which every policy is tried
MOMENTUM = 0.9
BALANCES: Mapping[str, tuple[Balance, ...]] = {
    "no_loss": (),
    "switch_loss": (SwitchLoss(alpha=0.01),),
    "sign_bias": (SignBias(rate=0.001),),
}
LENGTH = 128
HELD_OUT = 32
PAST = 10  # batches that an adaptive capacity has seen when it is timed
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


def named(factor: float, policy: str = "factor") -> str:
    """The arm of a capacity factor, by the policy that drops the least probable unless another is named."""
    return f"{policy}_{factor:g}"


FIXED: Mapping[str, Capacity] = {named(factor): Fixed(factor=factor) for factor in FACTORS}
ADAPTIVE: Mapping[str, Capacity] = {"adaptive": Adaptive(momentum=MOMENTUM)}
POLICIES: Mapping[str, Capacity] = {
    **{named(factor, "position"): Fixed(factor=factor, policy="position") for factor in POLICED},
    **{named(factor, "reroute"): Fixed(factor=factor, policy="reroute") for factor in POLICED},
}
CAPACITIES: Mapping[str, Capacity] = {"dropless": Dropless(), **FIXED, **ADAPTIVE, **POLICIES}
CONFIGS: Mapping[str, Config] = {
    **{name: vary(base(), **{"model.moe.capacity": capacity}) for name, capacity in CAPACITIES.items()},
    **{name: vary(base(), **{"model.moe.balance": balance}) for name, balance in BALANCES.items()},
}


FACTORS_OF: Mapping[str, float] = {named(factor): factor for factor in FACTORS}
POLICY_FACTORS: Mapping[str, Mapping[str, float]] = {
    "last dropped": {named(factor, "position"): factor for factor in POLICED},
    "sent on": {named(factor, "reroute"): factor for factor in POLICED},
}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per seed a cell for each arm's training, and one in which all capacities are timed. Quick has few steps, which a
    process for each arm would cost more than they do, and times once.
    """
    if profile == "quick":
        size = {"steps": (4,), "tokens": (256,)}
        trained = grid(seeds=range(SEEDS[profile]), seconds=7, timed=False, part=("training",), **size)
        return (*trained, *grid(seeds=(0,), seconds=7, part=("timing",), blocks=(1,), **size))
    size = {"steps": (120,), "tokens": (2048,)}
    return tuple(
        cell
        for seed in range(SEEDS[profile])
        for cell in (
            *grid(arms=CONFIGS, seeds=(seed,), seconds=20, timed=False, part=("training",), **size),
            *grid(seeds=(seed,), seconds=50, part=("timing",), blocks=(5,), **size),
        )
    )


def hours() -> float:
    """What the full profile takes, as its cells say."""
    return sum(cell.seconds for cell in cells("full")) / 3600


def measure(cell: Cell) -> list[Reading]:
    """Training: routing early and late and the held-out loss. Timing: bytes and time of a step on the same weights."""
    from bench.meters.paired import threads
    from dsv3.data.prepare import prepare

    prepared = prepare(base().data, base().model.vocab_size)
    with threads(1):  # products of a few rows gain nothing from a second thread
        if cell.axes["part"] == "timing":
            return _timed(cell, prepared)
        arms = tuple(CONFIGS) if cell.arm is None else (cell.arm,)
        return [reading for arm in arms for reading in _trained(arm, cell, prepared)]


def sized(name: str, cell: Cell) -> Config:
    """An arm's config at the cell's number of steps and tokens."""
    rows = int(cell.axes["tokens"]) // LENGTH
    return vary(CONFIGS[name], **{"train.steps": cell.axes["steps"], "train.batch_size": rows})


def _trained(name: str, cell: Cell, prepared: "Prepared") -> list[Reading]:
    """The held-out loss of an arm, and the routing of its first and of its last steps."""
    from bench.capacity import routed
    from dsv3.data.pack import Batches
    from dsv3.train import TrainState, train_step

    config = sized(name, cell)
    train = config.train
    state = TrainState.create(config, seed=_seed(cell), device=cell.device)
    batches = Batches(prepared.train, train.batch_size, LENGTH, _seed(cell))
    tenth = max(1, train.steps // 10)
    seen: dict[str, list[dict[tuple[str, float], float]]] = {"early": [], "late": []}
    for step in range(train.steps):
        rows = batches.next().to(state.device)
        if step < tenth or step >= train.steps - tenth:
            seen["early" if step < tenth else "late"].append(_balance(routed(state, rows)))
        report = train_step(state, rows)
        if report.health != "ok":
            return [Reading(arm=name, metric="loss", failed=f"step {report.step}: {report.health}")]
    found: list[tuple[dict[str, Value], str, float]] = [({}, "loss", _loss(state, prepared))]
    for when, steps in seen.items():
        for metric, factor in steps[0]:
            axes: dict[str, Value] = {"routing": when} | ({"factor": factor} if factor else {})
            found.append((axes, metric, fmean(step[metric, factor] for step in steps)))
    labels: dict[str, Any] = {"arm": name, "config": digest(config), "corpus": prepared.digest}
    return [
        Reading(measurement=Measurement(metric=metric, value=value), axes=axes, **labels)
        for axes, metric, value in found
    ]


def _balance(layers: Sequence[tuple[Any, Any]]) -> dict[tuple[str, float], float]:
    """Figures of a batch, means over layers, by metric and factor: 0, or that of a capacity that is not there."""
    from bench.capacity import figures, refusals

    found = []
    for layer, routing in layers:
        one = {(metric, 0.0): value for metric, value in figures(layer, routing).items()}
        if isinstance(layer.moe.capacity, Dropless):
            asked = refusals(routing, layer.moe, FACTORS)
            one |= {("refused_share", factor): share for factor, share in asked.items()}
        found.append(one)
    return {key: fmean(one[key] for one in found) for key in found[0]}


def _loss(state: "TrainState", prepared: "Prepared") -> float:
    """Nats per held-out token, nothing dropped."""
    from dsv3.train.evaluate import HeldOut, evaluate

    train = state.config.train
    heldout = HeldOut.of(prepared, prepared.validation, length=LENGTH, count=HELD_OUT)
    found = evaluate(state.model, heldout, step=state.step, batch_size=16, precision=train.precision)
    return found.nats_per_token


def _timed(cell: Cell, prepared: "Prepared") -> list[Reading]:
    """Bytes kept for backward and CPU time of a step on the dropless arm's weights, early, late and in balance."""
    from bench.capacity import step_blocks
    from dsv3.data.pack import Batches

    arms = _limited(cell, prepared)
    batches = Batches(prepared.validation, int(cell.axes["tokens"]) // LENGTH, LENGTH, _seed(cell))
    rows = batches.next()
    blocks = step_blocks({" ".join(key): arm for key, arm in arms.items()}, batches, int(cell.axes["blocks"]))
    return [
        Reading(arm=name, measurement=one, axes={"routing": routing})
        for (name, routing), arm in arms.items()
        for one in (*_times(blocks, name, routing, rows[:, 1:].numel()), *_counts(arm, rows))
    ]


def _limited(cell: Cell, prepared: "Prepared") -> "dict[tuple[str, str], Limited]":
    """By arm and routing, steps on the weights of early and late dropless training. Policies are timed late, factors in
    balance too, where an adaptive capacity has seen nothing but balance.
    """
    import torch

    from bench.capacity import Limited, frozen, past
    from dsv3.data.pack import Batches
    from dsv3.train import TrainState, train_step

    config, seed = sized("dropless", cell), _seed(cell)
    state = TrainState.create(config, seed=seed, device=cell.device)
    batches = Batches(prepared.train, config.train.batch_size, LENGTH, seed)
    at: dict[int, str] = {max(1, config.train.steps // 10): "early", config.train.steps: "late"}
    arms: dict[tuple[str, str], Limited] = {}
    for step in range(1, config.train.steps + 1):
        train_step(state, batches.next().to(state.device))
        if step not in at:
            continue
        weights = frozen(state)
        for name, capacity in CAPACITIES.items():
            adaptive = isinstance(capacity, Adaptive)
            averages = tuple(past(weights, batches, PAST, MOMENTUM)) if adaptive else ()
            if at[step] == "late" or name not in POLICIES:
                arms[name, at[step]] = Limited(weights, capacity, averages)
            if at[step] == "late" and name not in POLICIES:
                arms[name, "balanced"] = Limited(weights, capacity, tuple(map(torch.ones_like, averages)), seed)
    return arms


def _times(blocks: Sequence[Any], name: str, routing: str, tokens: int) -> tuple[Measurement, ...]:
    """Times of an arm, against dropless as routed alike and against itself in forced balance."""
    from bench.meters.paired import over_blocks, ratios, summary
    from bench.speed import rate

    key, taken = f"{name} {routing}", list(blocks)
    found = summary(taken, key, f"dropless {routing}", "step")
    found += (rate(found[1], "tokens_per_second", tokens),)
    if routing != "balanced" and name not in POLICIES:
        found += (over_blocks("routing_cpu_ratio", ratios(taken, key, f"{name} balanced", "cpu")),)
    return found


def _counts(arm: "Limited", rows: Any) -> tuple[Measurement, ...]:
    """Bytes kept; in forced balance also what is dropped and left empty, which training has no record of."""
    from bench.capacity import figures, routed
    from bench.meters.saved import saved_bytes

    with arm.applied() as state:
        state.model.train()
        found = (saved_bytes(lambda: state.model(rows[:, :-1]), state.model.parameters()),)
        if arm.balanced is None or isinstance(arm.capacity, Dropless):
            return found
        seen = [figures(layer, routing) for layer, routing in routed(state, rows)]
    shares = ("drop_share", "empty_slot_share")
    return found + tuple(Measurement(metric=name, value=fmean(one[name] for one in seen)) for name in shares)


def _seed(cell: Cell) -> int:
    assert cell.seed is not None, "every cell of this study has a seed"
    return cell.seed


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
    """Drops by factor, late and at chance; losses; policies; the past as a factor; times, real and in balance."""
    drops, losses = (
        ", ".join(f"{told(named(factor))} at factor {factor:g}" for factor in FACTORS)
        for told in (partial(_drops, records), partial(_gap, records))
    )
    return (
        f"Late in {_steps(records)} steps full experts drop {drops}. Against dropless a factor changes the held-out "
        f"loss, in nat/token, by {losses}. {_policies(records)} The average of past steps' largest loads is "
        f"{_late(records, 'adaptive', 'capacity_factor')} times the mean load: it drops "
        f"{_percent(_late(records, 'adaptive', 'drop_share'))} and changes the loss by {_gap(records, 'adaptive')}. "
        f"{_speeds(records)}"
    )


def _drops(records: Sequence[Record], arm: str) -> str:
    dropped, floor = (_late(records, arm, metric) for metric in ("drop_share", "drop_floor"))
    return f"{_percent(dropped)} (chance {_percent(floor)})"


def _policies(records: Sequence[Record]) -> str:
    """What each policy does at the tightest factor that all are tried at."""
    factor = POLICED[0]
    least, last, sent = (named(factor, policy) for policy in ("factor", "position", "reroute"))
    refused, dropped = (_late(records, sent, metric) for metric in ("refused_share", "drop_share"))
    asked = _at(records, "dropless", "refused_share", routing="late", factor=factor)
    return (
        f"At factor {factor:g} dropping the least probable changes it by {_gap(records, least)}, dropping the last by "
        f"{_gap(records, last)}, and sending on by {_gap(records, sent)}, where {_percent(refused)} are refused and "
        f"{_percent(dropped)} find no room; of dropless routing {_percent(asked)} would be refused."
    )


def _speeds(records: Sequence[Record]) -> str:
    """What the tightest factor saves on the same weights, and what routing costs beside forced balance."""
    least = named(FACTORS[0])
    late, early, balanced = (
        _at(records, least, "step_cpu_ratio", routing=routing) for routing in ("late", "early", "balanced")
    )
    whole, limited = (_late(records, arm, "routing_cpu_ratio") for arm in ("dropless", CLAIMED))
    return (
        f"On the same weights a step at factor {FACTORS[0]:g} takes {late} of dropless' CPU time late, {early} early "
        f"and {balanced} in forced balance. A dropless step as the router routes takes {whole} times what it takes in "
        f"forced balance, a step at factor 1.2 {limited} times."
    )


def _gap(records: Sequence[Record], arm: str) -> Estimate:
    return compare(records, arm=arm, baseline="dropless", metric="loss", steps=_steps(records))


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
    return f"{found.map(lambda share: 100 * share)}%"


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
        Arm("adaptive", "past steps' largest load, averaged; least probable dropped", config=CONFIGS["adaptive"]),
        *(
            Arm(named(factor, policy), f"{factor:g} x mean load, {words}", config=CONFIGS[named(factor, policy)])
            for policy, words in (("position", "last in the batch dropped"), ("reroute", "sent on where there is room"))
            for factor in POLICED
        ),
        Arm("no_loss", "dropless, no balance loss", CONFIGS["no_loss"]),
        Arm("switch_loss", "dropless, Switch loss, alpha 0.01", CONFIGS["switch_loss"]),
        Arm("sign_bias", "dropless, DeepSeek's bias at rate 0.001, no loss", CONFIGS["sign_bias"]),
    ),
    baseline="dropless",
    metrics=(
        "drop_share",
        "drop_floor",
        "refused_share",
        "empty_slot_share",
        "capacity_factor",
        "max_vio",
        "excess_max_vio",
        "loss",
        "step_cpu_ratio",
        "routing_cpu_ratio",
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
        Figure(
            "curves",
            "Loss, time, memory and drops against the capacity: a line by factor, a star where it follows past loads",
            metric="loss",
            against_baseline=True,
            draw=partial(curves, fixed=FACTORS_OF, policies=POLICY_FACTORS),
        ),
        _drawn("drop_share", "Assignments dropped late in training"),
        _drawn("excess_max_vio", "MaxVio late in training, as a multiple of chance"),
        Figure("loss", "Held-out loss, same seed and text", metric="loss", kind="interval", against_baseline=True),
        _drawn("step_cpu_ratio", "CPU time of a training step against dropless, as the trained router routes"),
        Figure(
            "forced",
            "CPU time of a step, as the router routes / in forced balance",
            metric="routing_cpu_ratio",
            kind="interval",
        ),
    ),
    answer=answer,
    limits=(
        "A short training of a small model, two layers of experts: a router that had billions of tokens to settle is "
        "better balanced, and then drops less.",
        "Few tokens per expert: chance alone drops more than at the batch sizes of a large run, as the floor says.",
        "Speed is that of one process that holds all experts, where a full expert delays nobody but itself; across "
        "machines the fullest one sets the pace, which this does not measure.",
        "Dropping by probability, as the article has it, is not causal, and neither is sending on: a later token takes "
        "an earlier one's place. Losses compare trainings; evaluation is dropless, and so causal in every arm.",
        f"The full profile is meant to take {hours():.1f} hours of one core, in cells of a minute at most.",
    ),
)
