"""Precision modes: the format in which a training step multiplies, and what protects it.

Weights and optimizer state are fp32 in all of them.

    Float32       every product in fp32: the reference
    BFloat16      autocast: matrix products in bf16
    Float16       autocast in fp16 under dynamic loss scaling
    Float8Block   DeepSeek-V3's recipe (arXiv 2412.19437 section 3.3), emulated: e4m3 codes, activations scaled per
                  1 x 128 tile, weights per 128 x 128 block, products accumulated in fp32
"""

from dataclasses import dataclass
from typing import Literal

from dsv3.config.rules import require_number, require_one_of, require_positive


@dataclass(frozen=True, kw_only=True)
class Float32:
    """Every product in fp32."""


@dataclass(frozen=True, kw_only=True)
class BFloat16:
    """Products in bf16 by autocast; weights and optimizer state stay fp32."""


@dataclass(frozen=True, kw_only=True)
class Float16:
    """Products in fp16 by autocast, under a loss scale that halves at an overflow and doubles after quiet steps."""

    init_scale: float = 65536.0
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        require_number(self, "init_scale", low=1.0)
        require_positive(self, "growth_interval")


@dataclass(frozen=True, kw_only=True)
class Float8Block:
    """Linear layers on block-scaled fp8 codes; router, head, norms and the attention core keep fp32."""

    format: Literal["e4m3", "e5m2"] = "e4m3"
    block: int = 128
    scale: Literal["fp32", "ue8m0"] = "fp32"

    def __post_init__(self) -> None:
        require_one_of(self, "format", ("e4m3", "e5m2"))
        require_positive(self, "block")
        require_one_of(self, "scale", ("fp32", "ue8m0"))


Precision = Float32 | BFloat16 | Float16 | Float8Block
