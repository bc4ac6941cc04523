"""Budgets as tables on a terminal."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from bench.budget import wall
from bench.budget.activations import POLICIES, by_module, kept
from bench.budget.asked import Asked, examples, figures
from bench.budget.published import compared
from bench.budget.splits import fullest, shares
from bench.budget.states import RECIPES
from bench.budget.traffic import sent
from dsv3.model import cost

STEPS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
KINDS = ("parameters", "gradients", "optimizer", "activations", "working", "total")


def by_arithmetic(asked: Asked) -> Iterator[Table]:
    """What needs no trace."""
    yield size(asked)
    yield states(asked)
    yield activations(asked)
    yield ranks(asked)
    yield traffic(asked)
    if compared(asked.config.model):
        yield published(asked)
    yield runs()
    yield ratios()


def size(asked: Asked) -> Table:
    """Parameters, work and cache of a token."""
    model, length = asked.config.model, asked.batch.length
    rows = [
        ("parameters", f"{cost.parameters(model):,}"),
        ("active per token, without MTP", f"{cost.active_parameters(model, mtp=False):,}"),
        (f"training FLOPs per token at length {length}", f"{cost.flops_per_token(model, length, training=True):.4g}"),
        ("the same without MTP", f"{cost.flops_per_token(model, length, training=True, mtp=False):.4g}"),
        ("bytes of cache per token, bf16", f"{cost.kv_bytes_per_token(model):,}"),
    ]
    return grid(asked.name, ("", ""), rows)


def states(asked: Asked) -> Table:
    """Parameters, gradients and optimizer state by recipe."""
    parameters = cost.parameters(asked.config.model)
    rows = [
        (recipe.name, *(size_of(parameters * each) for each in (recipe.weight, recipe.gradient, recipe.optimizer)))
        for recipe in RECIPES
    ]
    return grid("states", ("recipe", "parameters", "gradients", "optimizer"), rows)


def activations(asked: Asked) -> Table:
    """What a microbatch keeps for backward, by module and policy."""
    found = {policy: by_module(kept(asked.config.model, asked.batch, policy)) for policy in POLICIES}
    modules = dict.fromkeys(module for policy in POLICIES for module in found[policy])
    rows = [(module, *(size_of(found[policy].get(module, 0)) for policy in POLICIES)) for module in modules]
    rows.append(("all", *(size_of(sum(found[policy].values())) for policy in POLICIES)))
    title = f"kept for backward: {asked.sequences} x {asked.batch.length} tokens, {asked.recipe.name}"
    return grid(title, ("module", *POLICIES), rows)


def ranks(asked: Asked) -> Table:
    """The fullest rank by split."""
    rows = []
    for split in examples(asked):
        most = fullest(shares(asked.config.model, split, asked.recipe, asked.batch, asked.policy))
        rows.append((split.name, f"{split.ranks}", f"{most.stage}", *(size_of(getattr(most, kind)) for kind in KINDS)))
    title = f"fullest rank: {asked.recipe.name}, recompute {asked.policy} (splits by arithmetic, not traced)"
    return grid(title, ("split", "ranks", "stage", *KINDS), rows)


def traffic(asked: Asked) -> Table:
    """What this rank sends in a step by split."""
    rows = []
    for split in examples(asked):
        stage = fullest(shares(asked.config.model, split, asked.recipe, asked.batch, asked.policy)).stage
        found = sent(asked.config.model, split, asked.recipe, asked.batch, stage)
        rows.append((split.name, *(size_of(value) for value in found.values())))
    return grid("sent by that rank in a step", ("split", "data", "tensor", "pipeline", "expert"), rows)


def published(asked: Asked) -> Table:
    """Published figures and ours."""
    rows = [
        (row.quantity, f"{row.published:.6g}", f"{row.ours:.6g}", percent(row.deviation), row.source, row.note)
        for row in compared(asked.config.model)
    ]
    return grid("published", ("quantity", "published", "ours", "deviation", "source", ""), rows)


def runs() -> Table:
    """Hours and price of 100 billion parameters, one input changed at a time, beside DeepSeek-V3's own run."""
    rows = [
        (name, f"{run.hours:,.0f}", f"{run.dollars:,.0f}", f"{run.cards_for_72_hours:,.0f}")
        for name, run in (*wall.varied(), ("DeepSeek-V3's pre-training, by arithmetic", wall.deepseek()))
    ]
    told = wall.PUBLISHED_HOURS["pre-training"]
    said = (f"{told / wall.CARDS:,.0f}", f"{told * wall.PRICE:,.0f}", f"{told / wall.HOURS_ASKED:,.0f}")
    rows.append(("DeepSeek-V3's pre-training, as published", *said))
    title = "H2, 72 hours: 100 billion parameters, one input changed at a time"
    return grid(title, ("run", "hours", "dollars", "cards for 72 h"), rows)


def ratios() -> Table:
    """Cost against what one could call usual."""
    rows = [(name, f"{ratio:.3f}") for name, ratio in wall.ratios()]
    title = "H1, 1/5 of the usual cost: 100 billion parameters, sparse, against"
    return grid(title, ("peer", "cost ratio"), rows)


def agreement(asked: Asked, answers: Mapping[str, Mapping[str, int]]) -> Table:
    """Analytic and traced figures, and the allocator's where the step fits in memory."""
    arithmetic = figures(asked)
    others = [arm for arm in answers if arm != "analytic"]
    rows = []
    for metric, value in arithmetic.items():
        row = [metric.replace("_", " "), f"{value:,}"]
        for arm in others:
            there = answers[arm].get(metric)
            row += ["", ""] if there is None else [f"{there:,}", percent(value / there - 1)]
        rows.append(tuple(row))
    head = ["", "analytic", *(name for arm in others for name in (arm, "analytic against it"))]
    title = f"one device, {asked.recipe.name}, recompute {asked.policy}, gradients of an earlier microbatch there"
    return grid(title, head, rows)


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table: words to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", title_style="bold")
    for at, name in enumerate(head):
        words = at == 0 or name in ("source", "")
        made.add_column(name, justify="left" if words else "right")
    for row in rows:
        made.add_row(*row)
    return made


def size_of(value: float) -> str:
    """Bytes in binary steps, three figures that matter."""
    power = 0
    while value >= 1000 and power < len(STEPS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.3g} {STEPS[power]}"


def percent(share: float) -> str:
    """A deviation with its sign."""
    return f"{100 * share:+.2f}%"
