"""How evenly does each way of balancing load the experts, and what does it cost in loss at equal evenness?

Every method on the same small model with DeepSeek-V3's router (sigmoid scores, a shared expert), at several strengths;
each training starts from the same weights and reads the same text. With r rows for each of E experts, K to a token:

    excess squared CV      CV^2 - (1 - K/E) / r, its expectation under uniformly random routing: 0 is as even as chance.
                           Of all experts and comparable across batch sizes, so that methods are ranked by it
    excess MaxVio          MaxVio / that of uniformly random routing of as many tokens: 1 is as even as chance
    excess over blocks     MaxVio / that of a router even over all text, whose blocks of real tokens hang together; of
                           the most even method alone, since of a router that neglects experts this scales up their few
                           tokens, so that an uneven router looks even

Strength buys evenness with loss, so that methods are also compared where they are equally even: the loss of each is
interpolated between its strengths, linearly in log excess MaxVio, at an excess of MATCHED. Strengths beyond the most
even one are left out, since they overshoot; a method that is evener than MATCHED at its weakest has the loss that it
has there, and one that is never as even has none.

Balance is taken of the training's own batches, and of held-out text by the frozen model, each token for itself: there
in batches of as many rows, by which methods are ranked, and over all of the text, where what batches have by chance or
by topic evens out. Only held-out text is causal for every method: experts that choose tokens are even by force in
training and choose by what comes later. `switch` has the statistics of a microbatch, a quarter of the batch, as a
process has that does not talk to others; `global_batch` is the same loss on the whole. Centring moves all biases of a
layer alike, which changes no choice: its arm differs from `sign_bias` by rounding alone, which a training then makes
larger, and so shows how small a difference means nothing.
"""

from collections.abc import Mapping
from typing import Any

from ablations.balance_methods import CHANGES, STRENGTHS, parts_of, small_training
from ablations.comparison import Compared
from ablations.moe_balance_answer import (
    BASELINE,
    BUSIEST,
    COMPARISONS,
    HEADLINE,
    JUDGED,
    MARGIN,
    OVERALL,
    SEEDS,
    answer,
)
from ablations.moe_balance_pictures import heat, trade
from ablations.significance import ALPHA
from ablations.study import Arm, Cell, Figure, Profile, Reading, Study, Value, grid
from bench.measurement import Measurement
from dsv3.config import Config, digest

EXPERTS, K, LAYERS, LENGTH = 32, 2, 4, 128
RANKS = 8  # that the experts are laid out on, for the largest load of a rank
HELD_OUT = 128  # rows
DRAWN = ("none", "sign_bias", "quantile")  # of which loads are kept over the training, for a picture
LOOKS = 12  # at the loads over a training


def configured(arm: str, strength: str, *, steps: int, rows: int) -> Config:
    """The training of an arm at one strength."""
    return small_training(
        STRENGTHS[arm][strength],
        experts=EXPERTS,
        k=K,
        layers=LAYERS,
        length=LENGTH,
        held_out=HELD_OUT,
        parts=parts_of(arm),
        steps=steps,
        rows=rows,
    )


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A cell per seed, arm and strength; no time is measured."""
    if profile == "quick":
        at: dict[str, Any] = {"seconds": 5, "seeds": (0,), "timed": False, "strength": ("default",)}
        return grid(arms=("none", BASELINE), steps=(16,), rows=(8,), **at)
    every = [
        grid(arms=(arm,), seeds=(seed,), seconds=30, timed=False, strength=strengths, steps=(300,), rows=(8,))
        for seed in range(SEEDS[profile])
        for arm, strengths in STRENGTHS.items()
    ]
    return sum(every, ())


def measure(cell: Cell) -> list[Reading]:
    """One training: balance late in it and on held-out text, the held-out loss, and of few arms loads on the way."""
    import torch

    from bench.meters.load import excess_over_blocks, excess_over_layers, of_batches, to_mean
    from bench.routed_training import routed
    from dsv3.data.prepare import prepare

    assert cell.arm is not None, "each arm trains in a cell of its own"
    assert cell.seed is not None, "every cell of this study has a seed"
    torch.set_num_threads(1)  # sums have one order whatever the cores
    steps, rows, strength = int(cell.axes["steps"]), int(cell.axes["rows"]), str(cell.axes["strength"])
    config = configured(cell.arm, strength, steps=steps, rows=rows)
    prepared = prepare(config.data, config.model.vocab_size)
    late = range(steps - max(1, steps // 10) + 1, steps + 1)
    drawn = cell.seed == 0 and cell.arm in DRAWN and strength == "default"
    looked = range(1, steps + 1, max(1, steps // LOOKS)) if drawn else ()
    try:
        found = routed(config, prepared, cell.seed, {*late, *looked})
    except FloatingPointError as diverged:
        return [Reading(arm=cell.arm, metric="loss", failed=str(diverged))]
    shuffled = found.held_out[torch.randperm(HELD_OUT, generator=torch.Generator().manual_seed(0))]
    texts = {
        "train": [found.on_the_way[step] for step in late],
        "held_out": [part.sum(dim=0) for part in shuffled.split(rows)],
    }
    points: list[tuple[dict[str, Value], dict[str, float]]] = [({}, {"loss": found.loss})]
    for text, batches in texts.items():
        at: dict[str, Value] = {"text": text, "loads": "batch"}
        points.append((at, of_batches(batches, K, ranks=RANKS)))
        points += [
            ({**at, "over_layers": which}, {"excess_max_vio": value})
            for which, value in excess_over_layers(batches, K).items()
        ]
    points.append(
        ({"text": "held_out", "loads": "batch"}, {"excess_over_blocks": excess_over_blocks(shuffled, K, rows)})
    )
    points.append(({"text": "held_out", "loads": "all"}, of_batches([shuffled.sum(dim=0)], K, ranks=RANKS)))
    points += [
        ({"expert": expert, "step": step}, {"load_to_mean": ratio})
        for step in looked
        for expert, ratio in enumerate(to_mean(found.on_the_way[step][-1]))
    ]
    return [
        Reading(
            arm=cell.arm,
            measurement=Measurement(metric=metric, value=value),
            axes=axes,
            config=digest(config),
            corpus=prepared.digest,
        )
        for axes, figures in points
        for metric, value in figures.items()
    ]


def _headline(name: str, over: str, where: Mapping[str, Value]) -> Figure:
    return Figure(
        f"{HEADLINE}_{name}",
        f"Excess squared CV {over}, default strengths (0: chance)",
        metric=HEADLINE,
        kind="interval",
        where={"strength": "default", **where},
        log="x",
    )


STUDY = Study(
    name="moe_balance",
    question="How evenly does each way of balancing load the experts, and at which loss?",
    arms=tuple(Arm(name, changes) for name, changes in CHANGES.items()),
    baseline=BASELINE,
    metrics=(
        HEADLINE,
        "excess_max_vio",
        "excess_over_blocks",
        "loss",
        "max_vio",
        "rank_max_vio",
        "gini",
        "dead_experts",
        "effective_experts",
        "load_to_mean",
    ),
    untabled=("load_to_mean",),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    compared=(
        Compared(
            "loss",
            margin=MARGIN,
            why="what DeepSeek-V3 reports between losses of a sequence and of a batch (arXiv:2412.19437 section 4.5.3)",
            where={"strength": "default"},
        ),
    ),
    configs={name: configured(name, "default", steps=300, rows=8) for name in CHANGES},
    figures=(
        _headline("batch", "in a batch of held-out text", JUDGED),
        _headline("all", "over all held-out text", OVERALL),
        Figure("trade", "What evenness costs: held-out loss by strength, from weak to strong", draw=trade),
        Figure(
            "excess_max_vio",
            "Excess MaxVio on held-out text at default strengths",
            metric="excess_max_vio",
            kind="interval",
            where={"strength": "default", **BUSIEST},
            log="x",
            reference=(1.0, "chance"),
        ),
        Figure("heat", "Load of the last layer's experts over training, first seed", draw=heat),
    ),
    answer=answer,
    limits=(
        "A small model and a short training: routers that had billions of tokens to settle drift less.",
        "Losses at equal evenness are interpolated, and one learning rate serves all methods.",
        "Rivals of the most even method and the published contrast are judged by t intervals at "
        f"{ALPHA:g}/{COMPARISONS}, the strictest level of Holm's family in the table of losses.",
        "Exact quantiles have no arm here: moe_recovery has one, and a test holds histograms to them.",
        "Excess MaxVio alone has percentiles over layers; no arm drops a token: what a capacity drops, and by chance, "
        "stands in moe_capacity.",
    ),
)
