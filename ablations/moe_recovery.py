"""How fast each way of balancing leads routers out of a collapse, update by update.

A small model with DeepSeek-V3's router trains for a while under the Switch loss, which evens the router's weight itself
and leaves its bias at zero. Then each expert layer is collapsed to MaxVio COLLAPSED, by a shift of FAVOURED experts'
rows of the router's weight (`bench.collapsed_routing`), and every method goes on from there, at its default strength
and at its strongest, with the same weights, moments of the optimizer and batches. The loads of each batch are looked at
before its update, each token choosing for itself, also where experts choose in training.

    excess MaxVio      MaxVio / that of uniformly random routing of as many tokens: the mean over layers
    recovered          from the first batch whose excess is at most RECOVERED, after so many updates
    censored           a training that never recovers while it is watched has no number of updates: what is said of it
                       is that, and the share of trainings that do

Rows are of LENGTH tokens. Tokens of one text want the same experts, so that batches of a few long rows are uneven under
an even router too, beyond what a method could be asked to mend; in batches of many short rows they hang together so
little that an even router's are as even as chance. Both floors of the router before its collapse stand in the answer.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ablations.balance_methods import ASKED, CHANGES, STRENGTHS, TRIED, parts_of, small_training
from ablations.moe_recovery_answer import BASELINE, SEEDS, answer
from ablations.moe_recovery_pictures import curves, steps
from ablations.study import Arm, Cell, Figure, Profile, Reading, Study, Value, grid
from bench.measurement import Measurement
from bench.metrics import RECOVERED
from dsv3.config import Balance, Config, ProportionalBias, Schedule, digest, vary

if TYPE_CHECKING:
    from torch import Tensor

    from dsv3.data.pack import Batches
    from dsv3.data.prepare import Prepared
    from dsv3.train import TrainState

EXPERTS, K, LAYERS, LENGTH = 64, 2, 3, 16
COLLAPSED, FAVOURED = 20.0, 2
EVENED = STRENGTHS["global_batch"]["alpha 1"]  # what the router is trained under before it collapses
HELD_OUT = 256  # rows
SHOWN = (*range(9), 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)  # updates after which a picture has the excess


def configured(balance: tuple[Balance, ...], *, parts: int, steps: int, rows: int) -> Config:
    """A training under these methods; its rate is constant, as long before a run's end."""
    sizes = {"experts": EXPERTS, "k": K, "layers": LAYERS, "length": LENGTH, "held_out": HELD_OUT}
    found = small_training(balance, parts=parts, steps=steps, rows=rows, **sizes)
    return vary(found, **{"train.schedule": Schedule(warmup=0.0, decay=0.0)})


def going_on(arm: str, strength: str, cell: Cell) -> Config:
    """The whole training of an arm at one strength, with what came before the collapse."""
    length = int(cell.axes["trained"]) + int(cell.axes["watched"])
    return configured(TRIED[arm][strength], parts=parts_of(arm), steps=length, rows=int(cell.axes["rows"]))


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A cell per seed, in which all methods go on from one collapse; no time is measured."""
    long: dict[str, Any] = {"trained": (200,), "watched": (100,), "rows": (64,)}
    short: dict[str, Any] = {"trained": (2,), "watched": (2,), "rows": (64,)}
    size, seconds = {"quick": (short, 15), "full": (long, 300)}[profile]
    return grid(seeds=range(SEEDS[profile]), seconds=seconds, timed=False, **size)


def measure(cell: Cell) -> list[Reading]:
    """The router before its collapse and what collapsed it, then every method from there."""
    import torch

    from bench.collapsed_routing import collapse
    from bench.training import sick_steps, train
    from dsv3.data.prepare import prepare
    from dsv3.train import TrainState

    assert cell.seed is not None, "every cell of this study has a seed"
    torch.set_num_threads(1)  # sums have one order whatever the cores
    trained, rows = int(cell.axes["trained"]), int(cell.axes["rows"])
    config = configured(EVENED, parts=1, steps=trained, rows=rows)
    prepared = prepare(config.data, config.model.vocab_size)
    state = TrainState.create(config, seed=cell.seed)
    if sick := sick_steps(train(state, prepared, cell.seed)):
        raise FloatingPointError(sick)
    readings = healthy(state, prepared, rows)
    done = collapse(state, _batches(prepared, cell).next(), favoured=FAVOURED, violation=COLLAPSED)
    offset = Measurement(metric="score_offset", value=sum(done.score_offset) / LAYERS)
    readings.append(Reading(arm=BASELINE, measurement=offset, axes={"router": "collapsed"}, corpus=prepared.digest))
    for arm, strengths in TRIED.items():
        for strength in strengths:
            readings += followed(arm, strength, state, prepared, cell)
    return readings


def healthy(state: "TrainState", prepared: "Prepared", rows: int) -> list[Reading]:
    """How even the router is before it collapses, on shuffled held-out rows: over chance, and over an even router's
    batches of the same text. It is one for all arms and stands at the baseline.
    """
    import torch

    from bench.meters.load import excess_over_blocks, excess_over_layers
    from bench.routed_training import loads
    from dsv3.train.evaluate import HeldOut

    heldout = HeldOut.of(prepared, prepared.validation, length=LENGTH, count=HELD_OUT)
    order = torch.randperm(len(heldout.rows), generator=torch.Generator().manual_seed(0))
    each = loads(state.model.eval(), heldout.rows)[order]
    batches = [part.sum(dim=0) for part in each.split(rows) if len(part) == rows]
    figures = {
        "excess_max_vio": excess_over_layers(batches, K)["mean"],
        "excess_over_blocks": excess_over_blocks(each[: rows * len(batches)], K, rows),
    }
    return [
        Reading(
            arm=BASELINE,
            measurement=Measurement(metric=metric, value=value),
            axes={"router": "healthy"},
            corpus=prepared.digest,
        )
        for metric, value in figures.items()
    ]


def followed(arm: str, strength: str, start: "TrainState", prepared: "Prepared", cell: Cell) -> list[Reading]:
    """One method from the collapsed state, which it leaves as it is."""
    from bench.collapsed_routing import watched
    from dsv3.train import TrainState

    assert cell.seed is not None, "every cell of this study has a seed"
    config = going_on(arm, strength, cell)
    state = TrainState.create(config, seed=cell.seed)
    state.load_state_dict(deepcopy(start.state_dict()))
    at: dict[str, Value] = {"strength": strength}
    try:
        seen = watched(state, _batches(prepared, cell), int(cell.axes["watched"]))
    except FloatingPointError as diverged:
        never = Measurement(metric="recovered_share", value=0.0)
        return [
            Reading(arm=arm, measurement=never, axes=at, config=digest(config), corpus=prepared.digest),
            Reading(arm=arm, metric="loss", failed=str(diverged), axes=at),
        ]
    points = [*figures(seen), ({}, {"loss": _loss(state, prepared)})]
    return [
        Reading(
            arm=arm,
            measurement=Measurement(metric=metric, value=value),
            axes={**at, **axes},
            config=digest(config),
            corpus=prepared.digest,
        )
        for axes, found in points
        for metric, value in found.items()
    ]


def figures(seen: "list[Tensor]") -> list[tuple[dict[str, Value], dict[str, float]]]:
    """What the loads [L, E] of batches after 0, 1, ... updates say, with the axes of each point."""
    from bench.meters.load import excess_over_layers, of_batches

    last = len(seen) - 1
    excess = [excess_over_layers([loads], K)["mean"] for loads in seen]
    points: list[tuple[dict[str, Value], dict[str, float]]] = [
        ({"updates": update}, {"excess_max_vio": excess[update]}) for update in SHOWN if update <= last
    ]
    for update in sorted({0, min(ASKED, last), last}):
        found = of_batches([seen[update]], K, ranks=1)
        points.append(({"updates": update}, {name: found[name] for name in ("max_vio", "dead_experts")}))
    first = next((update for update, value in enumerate(excess) if value <= RECOVERED), None)
    points.append(({}, {"recovered_share": float(first is not None)}))
    if first is not None:
        points.append(({}, {"recovery_steps": first}))
    return points


def _loss(state: "TrainState", prepared: "Prepared") -> float:
    from dsv3.train.evaluate import HeldOut, evaluate

    train = state.config.train
    heldout = HeldOut.of(prepared, prepared.validation, length=LENGTH, count=HELD_OUT)
    found = evaluate(state.model, heldout, step=state.step, batch_size=train.batch_size, precision=train.precision)
    return found.nats_per_token


def _batches(prepared: "Prepared", cell: Cell) -> "Batches":
    """The batches after those that the router was trained on before its collapse."""
    from dsv3.data.pack import Batches

    assert cell.seed is not None, "every cell of this study has a seed"
    rows = int(cell.axes["rows"])
    batches = Batches(prepared.train, rows, LENGTH, cell.seed)
    batches.load_state_dict(batches.state_dict() | {"rows": rows * int(cell.axes["trained"])})
    return batches


STUDY = Study(
    name="moe_recovery",
    question="How fast does each way of balancing lead routers out of a collapse?",
    arms=(
        *(Arm(name, changes) for name, changes in CHANGES.items()),
        Arm("quantile_exact", "the exact quantile of all scores of a step, where quantile reads a histogram"),
    ),
    baseline=BASELINE,
    metrics=(
        "recovered_share",
        "recovery_steps",
        "dead_experts",
        "max_vio",
        "excess_max_vio",
        "excess_over_blocks",
        "score_offset",
        "loss",
    ),
    untabled=("excess_max_vio",),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    configs={arm: going_on(arm, "default", cells("full")[0]) for arm in TRIED},
    figures=(
        Figure("curves", "Excess MaxVio after a collapse, by updates; bands: 95% intervals of the mean", draw=curves),
        Figure("steps", f"Updates until a batch is within {RECOVERED:g} times chance again", draw=steps),
    ),
    answer=answer,
    limits=(
        "One kind of collapse, of the router's weight: a bias that went astray, or experts that died and have "
        "unlearnt, are not tried.",
        "Routers were evened by a Switch loss before; a router under a bias would start from that bias.",
        f"A small model at a constant rate, on rows of {LENGTH} tokens: what the collapse does to the loss of a long "
        "training is not seen.",
        f"The proportional bias at its default moves a collapsed expert by {ProportionalBias().rate:g} x "
        f"{COLLAPSED:g} at once, about what this collapse takes; a deeper one would take it longer.",
        "A method recovers with its first batch at the border, which may be a lucky one; what it comes to is the "
        "excess at the end.",
    ),
)
