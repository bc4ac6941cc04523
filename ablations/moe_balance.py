"""How evenly does each way of balancing load the experts, and what does it cost in loss at equal evenness?

Every method on the same small model with DeepSeek-V3's router (sigmoid scores, a shared expert), at several strengths;
each training starts from the same weights and reads the same text. Strength buys evenness with loss, so that methods
are compared where they are equally even: the loss of each is interpolated between its strengths, linearly in log excess
MaxVio, at an excess of MATCHED. Strengths beyond the most even one are left out, since they overshoot; a method that is
evener than MATCHED at its weakest has the loss that it has there, and one that is never as even has none.

    excess MaxVio          MaxVio / that of uniformly random routing of as many tokens: 1 is as even as chance
    excess squared CV      its like without a maximum, comparable across batch sizes
    excess over blocks     MaxVio / that of a router even over all text, whose blocks of real tokens hang together; of
                           the most even method alone, since of a router that neglects experts this scales up their few
                           tokens, so that an uneven router looks even

The first two are taken twice: of the training's own batches, and of held-out text by the frozen model, each token for
itself. Only the second is causal for every method, and only there methods are ranked: experts that choose tokens are
even by force in training and choose by what comes later. `switch` has the statistics of a microbatch, a quarter of the
batch, as a process has that does not talk to others; `global_batch` is the same loss on the whole. Centring moves all
biases of a layer alike, which changes no choice: its arm differs from `sign_bias` by rounding alone, which a training
then makes larger, and so shows how small a difference means nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any

from ablations.balance_methods import CHANGES, MICROBATCHES, STRENGTHS
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, estimate, mean, replicates
from ablations.moe_balance_pictures import heat, trade
from ablations.significance import ALPHA, detectable
from ablations.study import Arm, Cell, Figure, Profile, Reading, Study, Value, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import Config, Dropless, MoE, MultiHead, digest, presets, vary

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
EXPERTS, K, LAYERS, LENGTH = 32, 2, 4, 128
RANKS = 8  # that the experts are laid out on, for the largest load of a rank
HELD_OUT = 128  # rows
MATCHED = 2.5  # the excess MaxVio at which losses are compared
ASKED = 1.15  # the excess MaxVio that a good method is asked to stay below
DRAWN = ("none", "sign_bias", "quantile")  # of which loads are kept over the training, for a picture
LOOKS = 12  # at the loads over a training
BASELINE = "sign_bias"


def configured(arm: str, strength: str, *, steps: int, rows: int) -> Config:
    """The training of an arm at one strength."""
    moe = MoE(
        n_routed_experts=EXPERTS,
        num_experts_per_tok=K,
        moe_intermediate_size=32,
        n_shared_experts=1,
        balance=STRENGTHS[arm][strength],
        capacity=Dropless(),
    )
    return vary(
        presets.article_small(),
        **{
            "model.hidden_size": 64,
            "model.num_hidden_layers": LAYERS,
            "model.intermediate_size": 128,
            "model.attention": MultiHead(num_attention_heads=2, head_dim=32),
            "model.moe": moe,
            "train.steps": steps,
            "train.batch_size": rows,
            "train.sequence_length": LENGTH,
            "train.eval_sequences": HELD_OUT,
            "train.accumulation_steps": MICROBATCHES if arm == "switch" else 1,
            "train.optimizer.lr": 3e-3,
        },
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


JUDGED: Mapping[str, Value] = {"text": "held_out", "loads": "batch", "over_layers": "mean"}


def answer(records: Sequence[Record]) -> str:
    """The most even method where no token sees a later one, against both floors; then losses at equal evenness."""
    steps = _steps(records)
    even = {arm: most_even(records, arm, steps) for arm in STRENGTHS if _has(records, arm, steps)}
    if not even:
        raise NoEvidence("no training has been judged on held-out text")
    best = min(even, key=lambda arm: even[arm][1].value)
    unaided = estimate(records, arm="none", metric="excess_max_vio", strength="default", steps=steps, **JUDGED)
    first = (
        f"On held-out text, each token for itself, the busiest expert exceeds the mean by {even[best][1]} times what "
        f"chance gives with the most even method, {best} at {even[best][0]} ({ASKED:g} was asked), and by {unaided} "
        f"times when nothing balances, after {steps} steps."
    )
    blocks = _over_blocks(records, best, even[best][0])
    return " ".join(filter(None, (first, blocks, _unseen(records, steps), _losses(records, even))))


def _over_blocks(records: Sequence[Record], arm: str, strength: str) -> str:
    """What is left of the most even method's excess when the text's own unevenness is taken out."""
    with suppress(NoEvidence):
        at: dict[str, Value] = {"strength": strength, "steps": _steps(records)}
        found = estimate(records, arm=arm, metric="excess_over_blocks", **at)
        return (
            "Tokens of a text want the same experts, so that a router even over all text is uneven in each batch: over "
            f"that its excess is {found}."
        )
    return ""


def _unseen(records: Sequence[Record], steps: int) -> str:
    """How uneven experts that choose tokens are once they may not."""
    with suppress(NoEvidence):
        at: dict[str, Value] = {"strength": "default", "steps": steps}
        found = estimate(records, arm="expert_choice", metric="excess_max_vio", **at, **JUDGED)
        return f"Experts that choose tokens, even by force in training, are at {found} when tokens choose."
    return ""


def _losses(records: Sequence[Record], arms: Iterable[str]) -> str:
    """By how much each method's loss differs from DeepSeek-V3's bias's where both are equally even."""
    losses = {arm: matched_losses(records, arm, _steps(records)) for arm in arms}
    ours = losses.pop(BASELINE, {})
    gaps = {
        arm: [found[seed] - ours[seed] for seed in sorted(found, key=str) if seed in ours]
        for arm, found in losses.items()
    }
    told = [
        f"{arm} {mean(values)}{_sight(values)}"
        for arm, values in sorted(gaps.items(), key=lambda item: fmean(item[1]) if item[1] else 0.0)
        if values
    ]
    if not told:
        return ""
    return f"Held-out loss at an excess of {MATCHED:g} minus that of DeepSeek-V3's bias, nat/token: {', '.join(told)}."


def _sight(values: Sequence[float]) -> str:
    """The smallest difference that so many seeds would have shown."""
    if len(values) < 2:
        return ""
    least = float(f"{detectable(values, alpha=ALPHA):.2g}")
    return f" (seen from {mean(values).map(lambda _: least)})"


def _steps(records: Sequence[Record]) -> int:
    steps = [int(record.axes["steps"]) for record in records if "steps" in record.axes]
    if not steps:
        raise NoEvidence("nothing was trained")
    return max(steps)


def _has(records: Sequence[Record], arm: str, steps: int) -> bool:
    return any((row.arm, row.metric, row.axes.get("steps")) == (arm, "excess_max_vio", steps) for row in records)


def most_even(records: Sequence[Record], arm: str, steps: int) -> tuple[str, Estimate]:
    """The strength at which the arm is most even in the mean over seeds, and how even."""
    found = {}
    for strength in STRENGTHS[arm]:
        with suppress(NoEvidence):  # not trained yet, or diverged
            at: dict[str, Value] = {"strength": strength, "steps": steps, **JUDGED}
            found[strength] = estimate(records, arm=arm, metric="excess_max_vio", **at)
    strength = min(found, key=lambda name: found[name].value)
    return strength, found[strength]


def matched_losses(records: Sequence[Record], arm: str, steps: int) -> dict[int | None, float]:
    """By seed the held-out loss at an excess of MATCHED; seeds in which no strength is as even are left out."""
    points: dict[int | None, list[tuple[float, float]]] = {}
    for strength in STRENGTHS[arm]:
        with suppress(NoEvidence):
            excess = replicates(records, arm=arm, metric="excess_max_vio", strength=strength, steps=steps, **JUDGED)
            loss = replicates(records, arm=arm, metric="loss", strength=strength, steps=steps)
            for seed in excess.keys() & loss.keys():
                points.setdefault(seed, []).append((float(excess[seed].value or 0.0), float(loss[seed].value or 0.0)))
    found = {seed: loss_at(pairs, MATCHED) for seed, pairs in points.items()}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def loss_at(points: Sequence[tuple[float, float]], excess: float) -> float | None:
    """The loss of (excess, loss) points, from weak to strong, where the excess is that: see the head of this file."""
    evenest = min(range(len(points)), key=lambda place: points[place][0])
    rising = points[: evenest + 1]
    as_even = [point for point in rising if point[0] <= excess]
    uneven = [point for point in rising if point[0] > excess]
    if not as_even:
        return None
    (x0, y0) = max(as_even)
    if not uneven:
        return y0
    (x1, y1) = min(uneven)
    return y0 + math.log(excess / x0) / math.log(x1 / x0) * (y1 - y0)


STUDY = Study(
    name="moe_balance",
    question="How evenly does each way of balancing load the experts, and at which loss?",
    arms=tuple(Arm(name, changes) for name, changes in CHANGES.items()),
    baseline=BASELINE,
    metrics=(
        "excess_max_vio",
        "excess_over_blocks",
        "excess_cv_squared",
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
            margin=0.005,
            why="what DeepSeek-V3 reports between losses of a sequence and of a batch (arXiv:2412.19437 section 4.5.3)",
            where={"strength": "default"},
        ),
    ),
    configs={name: configured(name, "default", steps=300, rows=8) for name in CHANGES},
    figures=(
        Figure("trade", "What evenness costs: loss against excess MaxVio, a point a strength", draw=trade),
        Figure(
            "excess_max_vio",
            "Excess MaxVio on held-out text at default strengths",
            metric="excess_max_vio",
            kind="interval",
            where={"strength": "default", **JUDGED},
            log="x",
            reference=(1.0, "chance"),
        ),
        Figure("heat", "Load of the last layer's experts over training, first seed", draw=heat),
    ),
    answer=answer,
    limits=(
        "A small model and a short training: routers that had billions of tokens to settle drift less.",
        "Losses at equal evenness are interpolated, and one learning rate serves all methods.",
        "Exact quantiles have no arm: a test holds histograms to them.",
    ),
)
