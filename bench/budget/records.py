"""Budgets as records of the study "budget": who found the figure is the arm, what was asked stands on the axes.

analytic, traced, allocator      parameters, states, kept activations, FLOPs and peak of one microbatch; with an axis
                                 "split", what one of several replicas sends, and its peak
rank                             bytes of the fullest rank, and bytes that it sends, by split and kind
published, ours                  a published figure and ours
run                              hours and price with one input changed; cost against a peer
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from bench.budget import wall
from bench.budget.activations import POLICIES, by_module, kept
from bench.budget.asked import Asked, examples
from bench.budget.published import compared
from bench.budget.shares import fullest, shares
from bench.budget.splits import Split
from bench.budget.traffic import sent
from bench.fingerprint import Provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record

STUDY = "budget"
Axes = dict[str, str | int | float]
Found = tuple[str, str, int | float, Axes]


def records(asked: Asked, provenance: Provenance) -> list[Record]:
    """Everything that arithmetic says."""
    return _kept([*_modules(asked), *_ranks(asked), *_published(asked), *_wall()], provenance)


def answered(
    asked: Asked, answers: Mapping[str, Mapping[str, int]], provenance: Provenance, split: Split | None = None
) -> list[Record]:
    """The figures of one device, or of one of the replicas of `split`, by who found them."""
    where = place(asked) | {"select": type(asked.config.model.attention.select).__name__}
    where |= {} if split is None else {"split": split.name}
    return _kept(
        [(arm, metric, value, where) for arm, found in answers.items() for metric, value in found.items()], provenance
    )


def _kept(found: Iterable[Found], provenance: Provenance) -> list[Record]:
    return [
        record(Point(study=STUDY, arm=arm, axes=axes), provenance, Measurement(metric=metric, value=value))
        for arm, metric, value, axes in found
    ]


def place(asked: Asked) -> Axes:
    """What identifies a microbatch on one device."""
    return {
        "model": asked.name,
        "recipe": asked.recipe.name,
        "recompute": asked.policy,
        "sequences": asked.sequences,
        "length": asked.batch.length,
    }


def _modules(asked: Asked) -> Iterator[Found]:
    for policy in POLICIES:
        for module, value in by_module(kept(asked.config.model, asked.batch, policy)).items():
            yield "analytic", "saved_bytes", value, place(asked) | {"recompute": policy, "module": module}


def _ranks(asked: Asked) -> Iterator[Found]:
    model = asked.config.model
    for split, policy in product(examples(asked), POLICIES):
        most = fullest(shares(model, split, asked.recipe, asked.batch, policy))
        where = place(asked) | {"recompute": policy, "split": split.name, "ranks": split.ranks, "stage": most.stage}
        for kind in ("parameters", "gradients", "optimizer", "activations", "working", "total"):
            yield "rank", "rank_bytes", getattr(most, kind), where | {"kind": kind}
        if policy == POLICIES[0]:
            for kind, value in sent(model, split, asked.recipe, asked.batch, most.stage).items():
                yield "rank", "sent_bytes", value, where | {"kind": kind}


def _published(asked: Asked) -> Iterator[Found]:
    for row in compared(asked.config.model):
        where: Axes = {"model": asked.name, "quantity": row.quantity, "source": row.source, "note": row.note}
        yield "published", row.metric, row.published, where
        yield "ours", row.metric, row.ours, where


def _wall() -> Iterator[Found]:
    runs = [*wall.varied(), ("DeepSeek-V3, pre-training", wall.deepseek())]
    for change, run in runs:
        where: Axes = {
            "change": change,
            "run": run.name,
            "tokens": run.tokens,
            "cards": run.cards,
            "utilisation": run.utilisation,
            "format": run.number_format,
            "price": run.price,
        }
        yield "run", "run_hours", run.hours, where
        yield "run", "run_dollars", run.dollars, where
    for run in wall.curves():
        yield "run", "run_hours", run.hours, {"curve": run.name, "cards": run.cards}
    for peer, ratio in wall.ratios():
        yield "run", "relative_cost", ratio, {"peer": peer}
    where = {"change": "DeepSeek-V3, published pre-training", "run": "DeepSeek-V3", "cards": wall.CARDS}
    yield "published", "run_hours", wall.PUBLISHED_HOURS["pre-training"] / wall.CARDS, where
    yield "published", "run_dollars", wall.PUBLISHED_HOURS["pre-training"] * wall.PRICE, where
