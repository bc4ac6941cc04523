"""Budgets as tables on a terminal."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.budget import wall
from bench.budget.activations import POLICIES, by_module, kept
from bench.budget.asked import DEEPSEEK, Asked, alone, examples, replicas
from bench.budget.published import compared
from bench.budget.shares import fullest, shares
from bench.budget.states import RECIPES
from bench.budget.traffic import sent
from bench.metrics import metric
from dsv3.model import cost

STEPS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
WORDS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))
KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "working": "working memory",
    "total": "together",
}
FIGURES = {
    "parameters": "parameters",
    "parameter_bytes": "bytes of parameters",
    "gradient_bytes": "bytes of gradients",
    "optimizer_bytes": "bytes of optimizer state",
    "saved_bytes": "bytes kept for backward",
    "flops": "floating-point operations",
    "sent_bytes": "bytes sent, by a ring",
    "live_bytes": "peak of bytes in memory",
}
LEGEND = (
    "tp, pp, ep, dp: ways of tensor, pipeline, expert and data parallelism. zero1: replicas share out the optimizer's\n"
    "state, zero2 gradients too, zero3 parameters too. x16: microbatches of a step. sp: tensor-parallel ranks cut the\n"
    "sequence too. dual_pipe: DualPipe instead of 1F1B. Working memory: what backward takes for a while."
)
Shown = Group


def of_the_model(asked: Asked) -> Iterator[Shown]:
    """What hangs on the model alone, and on a microbatch."""
    yield size(asked)
    yield states(asked)
    yield activations(asked)


def of_ranks(asked: Asked, same: Asked, device: Mapping[str, Mapping[str, int]] | None) -> Iterator[Shown]:
    """The fullest rank by split and what it sends; `device` has the figures of one device, if `same` was traced."""
    yield ranks(asked, same, device)
    yield traffic(asked)


def of_runs(asked: Asked) -> Iterator[Shown]:
    """Published figures of the model, and hours and prices, on which the question has no influence."""
    if compared(asked.config.model):
        yield published(asked)
    yield runs()
    yield ratios()


def size(asked: Asked) -> Shown:
    """Parameters, work and cache of a token."""
    model, length = asked.config.model, asked.batch.length
    mtp = cost.mtp_depths(model) > 0
    work = [cost.flops_per_token(model, length, training=True, mtp=also) for also in (True, False)]
    rows = [
        (f"parameters{', multi-token prediction (MTP) included' if mtp else ''}", f"{cost.parameters(model):,}"),
        *([("parameters without MTP", f"{cost.parameters(model, mtp=False):,}")] if mtp else []),
        ("parameters that a token passes through, without MTP", f"{cost.active_parameters(model, mtp=False):,}"),
        (f"floating-point operations to train on a token, sequences of {length}", in_words(work[0])),
        *([("the same without MTP", in_words(work[1]))] if mtp else []),
        ("cache of a token while decoding, bf16", f"{cost.kv_bytes_per_token(model):,} B"),
    ]
    return grid(asked.name, ("", ""), rows)


def states(asked: Asked) -> Shown:
    """Parameters, gradients and optimizer state by recipe."""
    parameters = cost.parameters(asked.config.model)
    rows = []
    for recipe in RECIPES:
        each = (recipe.weight, recipe.gradient, recipe.optimizer)
        rows.append((recipe.name, recipe.about, *(size_of(parameters * size) for size in (*each, sum(each)))))
    head = ("recipe", "", "parameters", "gradients", "optimizer", "together")
    return grid("States of the whole model, by recipe of number formats", head, rows, texts=(0, 1))


def activations(asked: Asked) -> Shown:
    """What a microbatch keeps for backward, by module and policy."""
    found = {policy: by_module(kept(asked.config.model, asked.batch, policy)) for policy in POLICIES}
    modules = dict.fromkeys(module for policy in POLICIES for module in found[policy])
    rows = [(module, *(size_of(found[policy].get(module, 0)) for policy in POLICIES)) for module in modules]
    rows.append(("together", *(size_of(sum(found[policy].values())) for policy in POLICIES)))
    title = f"What forward keeps for backward, by what is recomputed: {_microbatch(asked)}"
    return grid(title, ("module", *POLICIES), rows)


def ranks(asked: Asked, same: Asked, device: Mapping[str, Mapping[str, int]] | None) -> Shown:
    """The fullest rank by split."""
    rows = []
    for split in examples(asked):
        most = fullest(shares(asked.config.model, split, asked.recipe, asked.batch, asked.policy))
        where = f"{most.stage + 1} of {split.pp}"
        rows.append((split.name, f"{split.ranks}", where, *(size_of(getattr(most, kind)) for kind in KINDS)))
    title = f"Memory of the fullest rank: {_microbatch(asked)}, recompute {asked.policy}"
    note = "\n".join((LEGEND, f"DeepSeek-V3's own split is {DEEPSEEK.name}.", _held(same, device)))
    return grid(title, ("split", "ranks", "stage", *KINDS.values()), rows, note)


def _held(same: Asked, device: Mapping[str, Mapping[str, int]] | None) -> str:
    """How far the arithmetic behind the ranks lies from the trace: of everything, and of what is not states."""
    if device is None:
        return "By arithmetic; nothing here was traced."
    said, found = (device[arm]["live_bytes"] for arm in ("analytic", "traced"))
    share = alone(same)
    states = share.parameters + share.gradients + share.optimizer
    return (
        "By arithmetic. Where it can be traced, on one device, it is off by "
        f"{percent(deviation(said, found))}; without the states, which are exact, by "
        f"{percent(deviation(said - states, found - states))}."
    )


def traffic(asked: Asked) -> Shown:
    """What this rank sends in a step by split."""
    rows = []
    for split in examples(asked):
        rank = fullest(shares(asked.config.model, split, asked.recipe, asked.batch, asked.policy)).stage
        found = sent(asked.config.model, split, asked.recipe, asked.batch, rank)
        rows.append((split.name, *(size_of(value) for value in (*found.values(), sum(found.values())))))
    head = ("split", "data", "tensor", "pipeline", "expert", "together")
    return grid("What that rank sends in a step, by kind of parallelism (arithmetic)", head, rows)


def published(asked: Asked) -> Shown:
    """Published figures and ours."""
    rows = []
    for row in compared(asked.config.model):
        unit, told, ours = metric(row.metric).unit, in_words(row.published), in_words(row.ours)
        rows.append((row.quantity, told, ours, unit, percent(row.deviation), row.source, row.note))
    head = ("quantity", "published", "by this config", "unit", "difference", "source", "")
    return grid("Published figures of this model", head, rows, texts=(0, 3, 5, 6))


def runs() -> Shown:
    """Hours and price of 100 billion parameters, one input changed at a time, beside DeepSeek-V3's own run."""
    rows = [
        (name, f"{run.hours:,.0f}", f"{run.dollars:,.0f}", f"{run.cards_for_72_hours:,.0f}")
        for name, run in (*wall.varied(), ("DeepSeek-V3's pre-training, by arithmetic", wall.deepseek()))
    ]
    told = wall.PUBLISHED_HOURS["pre-training"]
    said = (f"{told / wall.CARDS:,.0f}", f"{told * wall.PRICE:,.0f}", f"{told / wall.HOURS_ASKED:,.0f}")
    rows.append(("DeepSeek-V3's pre-training, as published", *said))
    base = wall.sparse()
    note = (
        f"The first row: {in_words(base.tokens)} tokens on {base.cards} cards at {100 * base.utilisation:.2f}% of the "
        f"bf16 peak, {base.price:g} dollars an hour."
    )
    title = "The article's claim H2, 72 hours: a model of 100 billion parameters, one input changed at a time"
    return grid(title, ("run", "hours", "dollars", "cards for 72 hours"), rows, note)


def ratios() -> Shown:
    """Cost against what one could call usual."""
    rows = [(name, f"{ratio:.3f}") for name, ratio in wall.ratios()]
    title = "The article's claim H1, 1/5 of the usual cost: 100 billion parameters, as sparse as DeepSeek-V3's, against"
    return grid(title, ("what one could call usual", "cost ratio"), rows)


def agreement(asked: Asked, answers: Mapping[str, Mapping[str, int]]) -> Shown:
    """Analytic and traced figures, and the allocator's where the step fits in memory."""
    title = f"One device with the whole model: {_microbatch(asked)}, recompute {asked.policy}"
    note = "A microbatch after the first: its gradients are added to those of the one before."
    return _beside(title, answers, note)


def at_peak(asked: Asked, kinds: Mapping[str, int]) -> Shown:
    """What the peak of the traced step is made of, beside the arithmetic."""
    share, rest = alone(asked), "activations and working memory"
    said = {name: getattr(share, name) for name in ("parameters", "gradients", "optimizer")}
    said |= {rest: share.activations + share.working}
    rows = [(name, size_of(value), size_of(kinds.get(name, 0))) for name, value in said.items()]
    rows.append(("together", size_of(sum(said.values())), size_of(sum(kinds.values()))))
    return grid("What is there at its peak", ("", "arithmetic", "trace"), rows)


def replica(asked: Asked, answers: Mapping[str, Mapping[str, int]]) -> Shown:
    """One of several replicas: what it sends, and its peak."""
    title = f"One of {replicas(asked).dp} replicas of the whole model, gradients averaged at the end of the step"
    note = "Averaged in flat buffers, as dsv3.parallel does: one of all gradients, and one of their sums."
    return _beside(title, answers, note)


def _beside(title: str, answers: Mapping[str, Mapping[str, int]], note: str) -> Shown:
    said = answers["analytic"]
    others = {"traced": "trace", "allocator": "allocator"}
    arms = [arm for arm in others if arm in answers]
    rows = []
    for name, value in said.items():
        row = [FIGURES[name], f"{value:,}"]
        for arm in arms:
            there = answers[arm].get(name)
            row += ["", ""] if there is None else [f"{there:,}", percent(deviation(value, there))]
        rows.append(tuple(row))
    head = ["", "arithmetic", *(name for arm in arms for name in (others[arm], "arithmetic against it"))]
    return grid(title, head, rows, note)


def grid(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", *, texts: Sequence[int] = (0,)
) -> Shown:
    """A table, what it is above and what one must know below it; the columns `texts` are words, the others numbers."""
    made = Table(box=None, header_style="bold")
    for at, name in enumerate(head):
        made.add_column(name, justify="left" if at in texts else "right")
    for row in rows:
        made.add_row(*row)
    return Group(Text(title, style="bold"), made, *([Text(note)] if note else []))


def _microbatch(asked: Asked) -> str:
    return f"{asked.sequences} x {asked.batch.length} tokens, {asked.recipe.name}"


def size_of(value: float) -> str:
    """Bytes in binary steps, three figures that matter."""
    power = 0
    while value >= 1000 and power < len(STEPS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.3g} {STEPS[power]}"


def in_words(value: float) -> str:
    """A large number as 671.0 billion; a small one as it is."""
    for step, word in WORDS:
        if value >= step:
            return f"{value / step:,.4g} {word}"
    return f"{value:,.5g}" if value < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A deviation with its sign."""
    return "none" if share == 0 else f"{100 * share:+.2f}%" if abs(share) >= 5e-5 else "under 0.01%"


def deviation(first: float, second: float) -> float:
    """The first over the second, minus 1; none where both are 0."""
    return 0.0 if first == second else first / second - 1 if second else float("inf")
