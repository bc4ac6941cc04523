"""Hours and prices of a training run, by arithmetic: the claims H1 (1/5 of the usual cost) and H2 (72 hours).

    hours of a card  = tokens x FLOPs per token / (peak x utilisation x 3600)
    hours            = hours of a card / cards
    dollars          = hours of a card x price

Neither claim names tokens, cards, utilisation, number format, price or the peer whose cost is usual: each is a factor
here, varied one at a time around DeepSeek-V3's: 14.8 trillion tokens on 2048 H800 at 2 dollars an hour (arXiv
2412.19437 section 1), 38.94% of the bf16 peak (arXiv 2505.09343 table 4). A model of 100 billion parameters takes
6 FLOPs per active parameter and token (arXiv 2001.08361 section 2.1), attention left out; a sparse one activates
DeepSeek-V3's share of its parameters, 37.6 of 671 billion.
"""

from dataclasses import dataclass, replace

from bench.peaks import peak_flops
from dsv3.config import Model, presets
from dsv3.model import cost

BILLION_100 = 100e9
TOKENS, CARDS, UTILISATION, PRICE = 14.8e12, 2048, 0.3894, 2.0
TOKENS_PER_PARAMETER = 20  # compute-optimal for dense models: arXiv 2203.15556 table 3
PUBLISHED_HOURS = {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}
HOURS_ASKED, RATIO_ASKED = 72.0, 0.2
CARD_COUNTS = tuple(2**power for power in range(6, 18))
CARD = "NVIDIA H100 80GB HBM3"  # an H800 multiplies as fast: it differs in its links
FLOPS_PER_PARAMETER = 6


def peak(number_format: str) -> float:
    """Dense operations per second of the card."""
    found = peak_flops(CARD, number_format)
    assert found is not None, f"bench/peaks.toml has {CARD} in {number_format}"
    return found


@dataclass(frozen=True, kw_only=True)
class Run:
    """The inputs of a training run's length and price."""

    name: str
    flops_per_token: float
    tokens: float = TOKENS
    cards: int = CARDS
    utilisation: float = UTILISATION
    number_format: str = "bfloat16"
    price: float = PRICE

    @property
    def card_hours(self) -> float:
        """Hours that one card would take."""
        return self.tokens * self.flops_per_token / (peak(self.number_format) * self.utilisation * 3600)

    @property
    def hours(self) -> float:
        """Hours that all cards take."""
        return self.card_hours / self.cards

    @property
    def dollars(self) -> float:
        """What it costs."""
        return self.card_hours * self.price

    @property
    def cards_for_72_hours(self) -> float:
        """How many cards would end it in the claimed time."""
        return self.card_hours / HOURS_ASKED


def sparse() -> Run:
    """100 billion parameters, as sparse as DeepSeek-V3."""
    model = presets.deepseek_v3().model
    share = cost.active_parameters(model, mtp=False) / cost.parameters(model, mtp=False)
    return Run(name="100 billion, sparse", flops_per_token=FLOPS_PER_PARAMETER * BILLION_100 * share)


def dense() -> Run:
    """100 billion parameters, all of them active."""
    return Run(name="100 billion, dense", flops_per_token=FLOPS_PER_PARAMETER * BILLION_100)


def of_model(name: str, model: Model, length: int) -> Run:
    """The model itself, at DeepSeek-V3's tokens, cards, utilisation and price."""
    return Run(name=name, flops_per_token=cost.flops_per_token(model, length, training=True, mtp=False))


def deepseek() -> Run:
    """DeepSeek-V3's pre-training."""
    return of_model("DeepSeek-V3", presets.deepseek_v3().model, 4096)


def implied_utilisation() -> float:
    """The share of the bf16 peak at which our FLOPs take the published hours of pre-training."""
    run = replace(deepseek(), utilisation=1.0)
    return run.card_hours / PUBLISHED_HOURS["pre-training"]


def varied() -> tuple[tuple[str, Run], ...]:
    """The sparse run of 100 billion parameters with one factor changed at a time, and what was changed."""
    base = sparse()
    return (
        ("as DeepSeek-V3 trained", base),
        ("all parameters active", dense()),
        ("2 trillion tokens", replace(base, tokens=TOKENS_PER_PARAMETER * BILLION_100)),
        ("5 trillion tokens", replace(base, tokens=5e12)),
        ("256 cards", replace(base, cards=256)),
        ("16384 cards", replace(base, cards=16384)),
        ("20% of the peak", replace(base, utilisation=0.2)),
        ("50% of the peak", replace(base, utilisation=0.5)),
        ("the same share of the fp8 peak", replace(base, number_format="float8")),
        ("1 dollar an hour", replace(base, price=1.0)),
        ("4 dollars an hour", replace(base, price=4.0)),
    )


def curves() -> tuple[Run, ...]:
    """Sparse, dense and DeepSeek-V3's run on more and more cards."""
    return tuple(replace(run, cards=cards) for run in (sparse(), dense(), deepseek()) for cards in CARD_COUNTS)


def peers() -> tuple[tuple[str, Run], ...]:
    """Runs whose cost one could call usual."""
    return (
        ("dense, the same tokens", dense()),
        ("dense, 20 tokens per parameter", replace(dense(), tokens=TOKENS_PER_PARAMETER * BILLION_100)),
        ("dense, the same tokens, 50% of the peak", replace(dense(), utilisation=0.5)),
        ("sparse, the same tokens, 20% of the peak", replace(sparse(), utilisation=0.2)),
        ("DeepSeek-V3's pre-training", deepseek()),
        ("itself", sparse()),
    )


def ratios() -> tuple[tuple[str, float], ...]:
    """The cost of the sparse run over that of each peer."""
    return tuple((name, sparse().dollars / peer.dollars) for name, peer in peers())
