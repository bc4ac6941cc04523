"""Positions: rotary embedding, and YaRN when the context is stretched.

YaRN (arXiv 2309.00071) keeps fast frequencies, divides slow ones by `factor` and blends between; the softmax scale
grows by mscale squared.
"""

from dataclasses import dataclass

from dsv3.config.rules import require_number, require_positive


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Stretch positions `factor` times beyond the original maximum; the beta bounds count turns over that length."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        require_number(self, "factor", low=1.0)
        require_positive(self, "original_max_position_embeddings")
        for name in ("beta_fast", "beta_slow"):
            require_number(self, name, low=0.0, above=True)
        for name in ("mscale", "mscale_all_dim"):
            require_number(self, name, low=0.0)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding with base `theta`; `scaling` is None or Yarn."""

    theta: float = 10000.0
    scaling: Yarn | None = None

    def __post_init__(self) -> None:
        require_number(self, "theta", low=1.0, above=True)
