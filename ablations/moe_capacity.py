"""What a capacity factor drops, wastes, costs and saves, on routing that a model really makes and on perfect balance.

The article's layer (128 experts, top-2, softmax, its auxiliary loss) in a small model, trained once per arm from the
same weights on the same text. Early is the first tenth of the steps, late the last tenth; balanced is the trained model
with routers replaced by one that is perfectly balanced. One thing changes at a time: the factor, least probable
dropped; the factor's source, a moving average of past steps' largest loads; or the policy, at two factors. A factor c
gives every expert ceil(N K / E c) slots:

    refused share       assignments that ask a full expert / assignments; rerouting drops less than it refuses
    drop share          assignments that no expert takes / assignments; its floor is what uniformly random routing loses
    empty slot share    slots that no token takes / slots; 1 - 1/c at perfect balance, and what rounding up adds

The policy that drops nothing is no capacity at all: what one would have refused is counted on the dropless arm, at
every factor. Costs are those of steps on the dropless arm's weights, all capacities interleaved, so that a factor is
not credited with the routing that it led to; what it keeps for backward is counted likewise.

Without capacity three further ways of balancing are trained: what a factor drops is decided by the balance before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ablations.capacity_curves import curves
from ablations.claims import Claim, Outcome, Verdict
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, compare, decide, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Rule, Study, grid
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
    presets,
    vary,
)

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
        size: dict[str, Any] = {"steps": (4,), "tokens": (256,)}
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
    from ablations.capacity_cells import timed, trained
    from bench.meters.paired import threads

    with threads(1):  # products of a few rows gain nothing from a second thread
        if cell.axes["part"] == "timing":
            return timed(sized("dropless", cell), cell, CAPACITIES, only_late=tuple(POLICIES))
        arms = tuple(CONFIGS) if cell.arm is None else (cell.arm,)
        return [reading for arm in arms for reading in trained(arm, sized(arm, cell), cell, FACTORS)]


def sized(name: str, cell: Cell) -> Config:
    """An arm's config at the cell's number of steps and tokens."""
    rows = int(cell.axes["tokens"]) // LENGTH
    return vary(CONFIGS[name], **{"train.steps": cell.axes["steps"], "train.batch_size": rows})


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
        f"Late in {_steps(records)} steps full experts drop {drops}. Against dropless, as DeepSeek-V3 is, a factor "
        f"changes the held-out loss, in nat/token, by {losses}. {_policies(records)} The average of past steps' "
        f"largest loads is {_late(records, 'adaptive', 'capacity_factor')} times the mean load: it drops "
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
