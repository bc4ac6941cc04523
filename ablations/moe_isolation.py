"""Whether separate gradient paths for experts make two domains of text pull less against each other.

An expert's weights receive gradient from its own tokens alone, in every layer that sends a token to few experts: the
gradient from one expert's output to another's weights is zero, and is measured as such. What is left for the article's
"gradient isolation" to mean are the parameters that experts share and the norm that clips them together:

    balance_detached    the balance loss does not reach the router. It then trains nothing: balance is left to no one,
                        or, as in DeepSeek-V3, to a selection bias, which has no gradient (sign_bias)
    router_detached     the language loss does not reach the router, which the balance loss alone still trains
    clip_experts        each expert clipped by its own norm, against one norm for all (clip_global). Both are tight: the
                        usual norm of 1, that of the other arms, never clips here

A conflict shows in the gradients that prose and code give to one expert: their cosine, beside that of two batches of
one domain, which is as high as batches of this size let it be. At the router the language loss's gradient is compared
with that of the article's balance loss, as it is or, in arms that train without, as it would be.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ablations.claims import Claim, Outcome, Verdict
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, compare, decide, estimate
from ablations.moe_capacity import base
from ablations.study import Arm, Cell, Figure, Profile, Reading, Rule, Study, Value, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import Config, SignBias, digest, vary

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture
    from torch import Tensor

    from bench.gradient_paths import Paths
    from dsv3.data.prepare import Prepared
    from dsv3.train import TrainState

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
BASELINE = "article"
DETACHED = ("balance_detached", "router_detached")
TOGETHER, APART = "clip_global", "clip_experts"
MARGIN = 0.01  # nat/token
WHY = "1% of perplexity; ways of balancing differ by 0.6% of it at 1 billion parameters (arXiv:2408.15664, table 2)"
LENGTH = 128
LOOKS: Mapping[int, tuple[float, ...]] = {2: (0.1, 1.0), 5: (0.0, 0.1, 0.25, 0.5, 1.0)}  # shares of the steps done
EARLY, LATE = 0.1, 1.0
TIGHT = 0.25  # a norm that clips: about half of that of a gradient here
NEVER = 1e6  # a norm that does not
ONE, TWO = "one domain", "two domains"
DRAWN = (BASELINE, "balance_detached", "router_detached", "sign_bias")


def _configs() -> dict[str, Config]:
    article = base()
    return {
        BASELINE: article,
        "balance_detached": article,
        "router_detached": article,
        "sign_bias": vary(article, **{"model.moe.balance": (SignBias(rate=0.001),)}),
        "clip_global": vary(article, **{"train.clip_grad_norm": TIGHT}),
        "clip_experts": vary(article, **{"train.clip_grad_norm": NEVER}),
    }


CONFIGS: Mapping[str, Config] = _configs()


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per seed and arm a cell with one training, or, where starting processes would take longest, all arms in one."""
    if profile == "quick":
        return grid(seeds=range(SEEDS[profile]), seconds=6, timed=False, steps=(6,), tokens=(256,), looks=(2,))
    axes = {"steps": (100,), "tokens": (2048,), "looks": (5,)}
    return grid(arms=CONFIGS, seeds=range(SEEDS[profile]), seconds=25, timed=False, **axes)


def core_minutes(profile: Profile) -> float:
    """What all cells of the profile are expected to take of one core."""
    return sum(cell.seconds for cell in cells(profile)) / 60


def sized(arm: str, cell: Cell) -> Config:
    """An arm's config at the cell's number of steps and tokens."""
    rows = int(cell.axes["tokens"]) // LENGTH
    return vary(CONFIGS[arm], **{"train.steps": cell.axes["steps"], "train.batch_size": rows})


def measure(cell: Cell) -> list[Reading]:
    """Gradients at the looks of each training, and what came of it."""
    import torch

    from dsv3.data.prepare import prepare

    torch.set_num_threads(1)  # sums have one order whatever the cores
    prepared = prepare(base().data, base().model.vocab_size)
    arms = CONFIGS if cell.arm is None else (cell.arm,)
    return [reading for arm in arms for reading in _training(arm, cell, prepared)]


def paths(arm: str) -> "Paths":
    """How the arm keeps gradients apart."""
    from bench.gradient_paths import Paths

    match arm:
        case "balance_detached":
            return Paths(detached="balance")
        case "router_detached":
            return Paths(detached="language")
        case "clip_experts":
            moe = CONFIGS[arm].model.moe
            assert moe is not None, "every arm has experts"
            # All experts of a layer together may then have the norm that the whole gradient has in clip_global.
            return Paths(experts=TIGHT / math.sqrt(moe.n_routed_experts), others=TIGHT)
        case _:
            return Paths()


def _training(arm: str, cell: Cell, prepared: "Prepared") -> list[Reading]:
    from bench.gradient_paths import domain_batches, step
    from bench.training import sick_steps
    from dsv3.data.pack import Batches
    from dsv3.train import TrainState

    assert cell.seed is not None, "every cell of this study has a seed"
    config = sized(arm, cell)
    train, apart = config.train, paths(arm)
    state = TrainState.create(config, seed=cell.seed, device=cell.device)
    batches = Batches(prepared.train, train.batch_size, LENGTH, cell.seed)
    texts = domain_batches(prepared.validation, length=LENGTH, rows=2 * train.batch_size)
    looks = {round(share * train.steps): share for share in LOOKS[int(cell.axes["looks"])]}
    labels: dict[str, Any] = {"config": digest(config), "corpus": prepared.digest}
    readings, reports, clipped = list[Reading](), [], list[float]()
    for done in range(train.steps + 1):
        if done in looks:
            found = _look(state, texts, apart)
            readings += [_reading(arm, *one, labels, done=looks[done]) for one in found]
        if done < train.steps:
            report, share = step(state, batches.next().to(state.device), apart)
            reports.append(report)
            clipped.append(share)
    if sick := sick_steps(reports):
        return [Reading(arm=arm, metric="loss", failed=sick, **labels)]
    late = reports[-max(1, train.steps // 10) :]
    outcome = {
        "loss": _loss(state, prepared),
        "max_vio": fmean(fmean(report.max_vio) for report in late),
        "clipped_share": fmean(clipped),
    }
    if arm == BASELINE:
        outcome["cross_expert_gradient"] = _cross_expert_gradient(state, texts)
    return readings + [_reading(arm, metric, value, {}, labels) for metric, value in outcome.items()]


def _reading(
    arm: str, metric: str, value: float, axes: Mapping[str, Value], labels: Mapping[str, Any], **more: Value
) -> Reading:
    return Reading(arm=arm, measurement=Measurement(metric=metric, value=value), axes={**axes, **more}, **labels)


def _look(state: "TrainState", texts: "Tensor", apart: "Paths") -> list[tuple[str, float, dict[str, Value]]]:
    """How gradients agree at the router, means over layers, and between texts, means over the experts of all layers."""
    import torch

    from bench.gradient_paths import cosines, expert_gradients, router_agreements

    state.model.train()
    texts = texts.to(state.device)
    moe = CONFIGS[BASELINE].model.moe
    assert moe is not None, "every arm has experts"
    mixed = torch.cat([first[: len(first) // 4] for first, _ in texts])  # as many rows as in a batch of training
    agreements = router_agreements(state, mixed, moe)
    gradients = [[expert_gradients(state, rows, apart.detached) for rows in domain] for domain in texts]
    by_texts = dict(zip((ONE, TWO), cosines(gradients), strict=True))
    found: list[tuple[str, float, dict[str, Value]]] = [
        ("router_cosine", fmean(one.cosine for one in agreements), {}),
        ("router_pull", fmean(one.norm_ratio for one in agreements), {}),
        ("reached_share", len(by_texts[TWO]) / len(gradients[0][0]), {}),
    ]
    for name, each in by_texts.items():
        found.append(("gradient_cosine", each.mean().item(), {"texts": name}))
        found.append(("conflict_share", (each < 0).double().mean().item(), {"texts": name}))
    return found


def _loss(state: "TrainState", prepared: "Prepared") -> float:
    """Nats per held-out token, of text in which no look was taken."""
    from dsv3.train.evaluate import HeldOut, evaluate

    train = state.config.train
    heldout = HeldOut.of(prepared, prepared.test, length=LENGTH, count=train.eval_sequences)
    found = evaluate(state.model, heldout, step=state.step, batch_size=16, precision=train.precision)
    return found.nats_per_token


def _cross_expert_gradient(state: "TrainState", texts: "Tensor") -> float:
    """The largest gradient, in the first layer, of a random sum of one expert's output at another's weights."""
    import torch

    from dsv3.moe import Routing
    from dsv3.moe.isolation import cross_expert_jacobian

    layer = state.expert_layers[0]
    tokens = torch.randn(4 * LENGTH, layer.gate.weight.shape[1], generator=torch.Generator().manual_seed(0))
    back = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(state.device)
    routing = layer.gate(tokens.to(state.device))

    def summed(x: "Tensor", given: "Routing") -> "Tensor":
        return (layer.experts(x, given) * back).sum()[None]

    found = cross_expert_jacobian(summed, tokens.to(state.device), routing, tuple(layer.experts.parameters()))
    assert bool((found.diagonal()[(routing.counts > 0).cpu()] > 0).all()), "a sum sees the expert's own weights"
    return found.fill_diagonal_(0).max().item()


def reduces_conflicts(claim: Claim, records: Sequence[Record]) -> Verdict:
    """B3: the rise of the cosine between the gradients of two domains, for both losses that may be kept off the router:
    it holds if one of them raises it by the margin, and fails if neither does.
    """
    rises = [_rise(records, arm) for arm in DETACHED]
    there, ceiling = (_late(records, BASELINE, "gradient_cosine", texts=texts) for texts in (TWO, ONE))
    words = (
        f"Late in training the gradients that prose and code give to one expert have the cosine {there}, where two "
        f"batches of one domain have {ceiling}. Keeping the balance loss off the router raises it by {rises[0]}, "
        f"keeping the language loss off by {rises[1]}; DeepSeek's bias in place of the loss, which decides nothing "
        f"here, by {_rise(records, 'sign_bias')}. No expert's weights take gradient from another's tokens, whatever "
        "the design."
    )
    assert claim.margin is not None, "the claim has a margin"
    found = [decide(rise, words, at_least=claim.margin) for rise in rises]
    order = (Outcome.HOLDS, Outcome.UNDECIDABLE, Outcome.FAILS)
    return min(found, key=lambda verdict: (order.index(verdict.outcome), -(verdict.value or 0.0)))


def answer(records: Sequence[Record]) -> str:
    """What pulls at the router, what experts are pulled by, and what that does to the loss."""
    ratio, cosine = (
        [_at(records, BASELINE, name, done) for done in (EARLY, LATE)] for name in ("router_pull", "router_cosine")
    )
    losses = {arm: _gap(records, arm) for arm in CONFIGS if arm != BASELINE}
    told = ", ".join(f"{arm} {gap}" for arm, gap in losses.items())
    clipped = compare(records, arm=APART, baseline=TOGETHER, metric="loss", steps=_steps(records))
    across = _at(records, BASELINE, "cross_expert_gradient")
    shares = [_late(records, BASELINE, "conflict_share", texts=texts) for texts in (TWO, ONE)]
    return (
        f"At the router the gradient of the article's balance loss is {ratio[0]} of the language loss's norm after a "
        f"tenth of the steps and {ratio[1]} at the end, at cosines of {cosine[0]} and {cosine[1]}. Prose and code pull "
        f"against each other in a share {shares[0]} of the experts, two batches of one domain in {shares[1]}; the "
        f"gradient from one expert's output to another's weights is {across}. Held-out loss less that of the article's "
        f"paths, nat/token: {told}. Clipping each expert by itself instead of all by one norm as tight changes it by "
        f"{clipped}."
    )


def _rise(records: Sequence[Record], arm: str) -> Estimate:
    metric, steps = "gradient_cosine", _steps(records)
    return compare(records, arm=arm, baseline=BASELINE, metric=metric, steps=steps, done=LATE, texts=TWO)


def _gap(records: Sequence[Record], arm: str) -> Estimate:
    return compare(records, arm=arm, baseline=BASELINE, metric="loss", steps=_steps(records))


def _late(records: Sequence[Record], arm: str, metric: str, **where: Value) -> Estimate:
    return _at(records, arm, metric, LATE, **where)


def _at(records: Sequence[Record], arm: str, metric: str, done: float | None = None, **where: Value) -> Estimate:
    """In the longest training that was run."""
    when = {} if done is None else {"done": done}
    return estimate(records, arm=arm, metric=metric, steps=_steps(records), **when, **where)


def _steps(records: Sequence[Record]) -> int:
    steps = [int(record.axes["steps"]) for record in records if "steps" in record.axes]
    if not steps:
        raise NoEvidence("nothing was trained")
    return max(steps)


def agreement_over_training(table: Any) -> "Picture":
    """Cosine and norm ratio of the two losses' gradients at the router over the training, of the arms whose routers
    learn by different losses.
    """
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"].isin(["router_cosine", "router_pull"])]
    if rows.empty:
        raise NoEvidence("no look at the router yet")
    rows = rows[rows["steps"] == rows["steps"].max()]
    picture = Picture(figsize=(7.2, 3.4), layout="constrained")
    panels = picture.subplots(1, 2)
    drawn = [(arm, marker) for arm, marker in zip(DRAWN, "o^sD", strict=True) if arm in set(rows["arm"])]
    titles = {"router_cosine": "Cosine", "router_pull": "Norm of balance / norm of language"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for arm, marker in drawn:
            points = rows[(rows["metric"] == name) & (rows["arm"] == arm)].sort_values("done")
            look: dict[str, Any] = {"marker": marker, "markersize": 4, "label": arm}
            if arm == BASELINE:  # others lie on it
                look |= {"linewidth": 4, "markersize": 8, "alpha": 0.5}
            (line,) = axes.plot(points["done"], points["value"], **look)
            axes.fill_between(points["done"], points["low"], points["high"], color=line.get_color(), alpha=0.15, lw=0)
        axes.set(title=title, xlabel="share of the steps done")
        axes.grid(visible=True)
    panels[0].axhline(0.0, color="#7f7f7f", linestyle=":")
    panels[1].set_yscale("log")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(DRAWN))
    return picture


CHANGES: Mapping[str, str] = {
    BASELINE: "both losses reach the router, alpha 0.01; one norm of 1 clips the whole gradient",
    "balance_detached": "the balance loss does not reach the router: nothing balances",
    "router_detached": "the language loss does not reach the router: the balance loss alone trains it",
    "sign_bias": "DeepSeek's bias at rate 0.001 in place of the loss: no gradient",
    "clip_global": f"one norm of {TIGHT} clips the whole gradient",
    "clip_experts": f"each expert clipped to {TIGHT} / sqrt(experts) by itself, all else together to {TIGHT}",
}

STUDY = Study(
    name="moe_isolation",
    question="Do separate gradient paths for experts make texts pull less against each other?",
    arms=tuple(Arm(name, CHANGES[name], config=config) for name, config in CONFIGS.items()),
    baseline=BASELINE,
    metrics=(
        "gradient_cosine",
        "conflict_share",
        "reached_share",
        "router_cosine",
        "router_pull",
        "cross_expert_gradient",
        "loss",
        "max_vio",
        "clipped_share",
    ),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    compared=(
        Compared("loss", margin=MARGIN, why=WHY),
        Compared("loss", margin=MARGIN, why=WHY, arms=(APART,), baseline=TOGETHER),
    ),
    configs={name: sized(name, cells("full")[0]) for name in CONFIGS},
    rules=(Rule("B3", seeds=6, judge=reduces_conflicts),),
    figures=(
        Figure("agreement", "Gradients of language and balance at the router", draw=agreement_over_training),
        Figure(
            "conflicts",
            "Cosine of the gradients that two texts give to an expert, late in training",
            metric="gradient_cosine",
            kind="interval",
            where={"done": LATE},
        ),
        Figure(
            "rise",
            "Cosine between prose and code less that of the article's paths, same seed",
            metric="gradient_cosine",
            kind="interval",
            where={"done": LATE, "texts": TWO},
            against_baseline=True,
        ),
    ),
    answer=answer,
    limits=(
        "A short training of a small model, two layers of experts; at the router, means over both layers.",
        "Domains are prose (documentation and docstrings) and code of the running Python's library. An expert's "
        "gradient here is of few tokens, and mostly noise: compare two domains with two batches of one.",
        "A cosine is of gradients; the update is AdamW's, which divides each entry by its own size.",
        "Clipping at a norm of 1, as DeepSeek-V3 has it, never acts here; the two arms that clip are tighter.",
        f"That {APART} is compared with {TOGETHER} was declared after the runs, with the margin of the others.",
        "That gradients and the clipping norm do not depend on where experts are is tested, not measured here.",
        f"Budget of the full profile: {core_minutes('full'):.0f} minutes of one core.",
    ),
)
