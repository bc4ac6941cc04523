"""What was published about a model beside what its config gives here: size, cache, FLOPs.

A model is recognised by its parameters' names and shapes, so a checkpoint's config.json is checked like a preset.
FLOPs are those of training at length 4096 without the MTP module, by the conventions of `dsv3.model.cost`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.budget import wall
from dsv3.config import Model, presets
from dsv3.model import cost

LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A published figure, ours, and where it was published. `note` says what is counted, where that must be said."""

    quantity: str
    metric: str
    published: float
    ours: float
    source: str
    note: str = ""

    @property
    def deviation(self) -> float:
        """Ours over the published, minus 1."""
        return self.ours / self.published - 1


def compared(model: Model) -> tuple[Compared, ...]:
    """Every published figure of the model; none for a model of one's own."""
    found = {
        "deepseek_v3": _deepseek_v3,
        "deepseek_v2_lite": _deepseek_v2_lite,
        "article": _article,
    }
    return tuple(found[name](model)) if (name := recognised(model)) in found else ()


def recognised(model: Model) -> str | None:
    """The preset whose parameters this model has; None for a model that is none of them."""
    for name, preset in presets.every().items():
        if cost.parameter_shapes(preset().model) == cost.parameter_shapes(model):
            return name
    return None


def _deepseek_v3(model: Model) -> Iterator[Compared]:
    paper, isca = "arXiv:2412.19437 section 4.2", "arXiv:2505.09343"
    copies = 2 * model.vocab_size * model.hidden_size
    yield _parameters("parameters", 671e9, cost.parameters(model, mtp=False), paper, "without the MTP module")
    yield _parameters(
        "parameters of the checkpoint",
        685e9,
        cost.parameters(model) + copies,
        "huggingface.co/deepseek-ai/DeepSeek-V3",
        "with the MTP module and its copies of embedding and head",
    )
    yield Compared(
        quantity="active parameters",
        metric="active_parameters",
        published=37e9,
        ours=cost.active_parameters(model, mtp=False),
        source=paper,
        note="with embedding and head",
    )
    yield Compared(
        quantity="cache per token",
        metric="kv_bytes_per_token",
        published=70272,
        ours=cost.kv_bytes_per_token(model),
        source=f"{isca} table 1",
        note="bf16",
    )
    ours = cost.flops_per_token(model, LENGTH, training=True, mtp=False)
    yield _flops(250e9, ours, f"{isca} table 2", "at length 4096, without the MTP module")
    throughput = 15360 * 4096 / 19.926 / 2048
    yield _flops(385e12 / throughput, ours, f"{isca} table 4", "385 TFLOP/s a card over its tokens per second")
    yield from _training()


def _training() -> Iterator[Compared]:
    """The published run: its hours from our FLOPs at the published utilisation, and the other way round."""
    paper, hours = "arXiv:2412.19437 section 1", wall.PUBLISHED_HOURS
    rest = sum(hours.values()) - hours["pre-training"]
    run = wall.deepseek()
    told = f"14.8e12 tokens at {100 * run.utilisation:.2f}% of the bf16 peak"
    for quantity, more in (("hours of a card, pre-training", 0), ("hours of a card, all stages", rest)):
        yield Compared(
            quantity=quantity,
            metric="card_hours",
            published=hours["pre-training"] + more,
            ours=run.card_hours + more,
            source=paper,
            note=told + (f", and {more:,} h as published" if more else ""),
        )
    yield Compared(
        quantity="price",
        metric="run_dollars",
        published=5.576e6,
        ours=(run.card_hours + rest) * run.price,
        source=paper,
        note="those hours at 2 dollars",
    )
    yield Compared(
        quantity="share of the bf16 peak",
        metric="mfu",
        published=wall.UTILISATION,
        ours=wall.implied_utilisation(),
        source="arXiv:2505.09343 table 4",
        note="implied by the hours of pre-training",
    )


def _deepseek_v2_lite(model: Model) -> Iterator[Compared]:
    paper = "arXiv:2405.04434 appendix B"
    yield _parameters("parameters", 15.7e9, cost.parameters(model), paper)
    yield Compared(
        quantity="active parameters",
        metric="active_parameters",
        published=2.4e9,
        ours=cost.active_parameters(model, embedding=False),
        source=paper,
        note="without the embedding",
    )


def _article(model: Model) -> Iterator[Compared]:
    yield _parameters("parameters", 67e9, cost.parameters(model), "the article, section 3", "widths are ours")


def _parameters(quantity: str, published: float, ours: float, source: str, note: str = "") -> Compared:
    return Compared(quantity=quantity, metric="parameters", published=published, ours=ours, source=source, note=note)


def _flops(published: float, ours: float, source: str, note: str) -> Compared:
    return Compared(
        quantity="training FLOPs per token",
        metric="flops_per_token",
        published=published,
        ours=ours,
        source=source,
        note=note,
    )
