"""Weights stored as FP8 codes: e4m3 [out, in] with one scale per 128 x 128 block, W = code * weight_scale_inv.

DeepSeek-V3 stores fp32 scales, V3.1 powers of two (`scale_fmt: ue8m0`); arXiv 2412.19437 section 3.3.2. The product
is computed in fp32 and rounded once to the type of the model, bf16 for the published checkpoints. Quantising a
dequantised weight again need not give the same codes, so they are kept beside the model: a weight that nobody changed
is written back as the very codes that were read, a changed one is quantised anew in the same format.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dsv3.config.rules import require
from dsv3.precision.block_scale import Quantised, Recipe, dequantise, quantise
from dsv3.precision.formats import named

BLOCK = 128
SUFFIX = "_scale_inv"
CODES = "F8_E4M3"

QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
# Says which modules have no codes; which tensors have a scale beside them says the same.
IRRELEVANT = ("modules_to_not_convert", "dequantize")


@dataclass(frozen=True, kw_only=True)
class Float8Weights:
    """The codes and scales of a checkpoint's FP8 weights, each by the name of its weight; `scale_fmt` says how new
    scales are made.
    """

    scale_fmt: Literal["fp32", "ue8m0"]
    codes: dict[str, Tensor]
    scales: dict[str, Tensor]

    def config(self) -> dict[str, Any]:
        """What config.json says under `quantization_config`."""
        return QUANTIZATION | ({"scale_fmt": "ue8m0"} if self.scale_fmt == "ue8m0" else {})

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for: code * scale in fp32, rounded once to `dtype`."""
        quantised = Quantised(codes=self.codes[name], scale=self.scales[name].float(), recipe=self._recipe)
        return dequantise(quantised, torch.float32).to(dtype)

    def stored(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale to write for `weight`: those that were read while they still stand for it, new ones
        otherwise.
        """
        if torch.equal(self.weight(name, weight.dtype), weight):
            return self.codes[name], self.scales[name]
        new = quantise(weight.float(), self._recipe)
        return new.codes, new.scale.to(self.scales[name].dtype)

    @property
    def _recipe(self) -> Recipe:
        return Recipe(format=named("e4m3"), tile=(BLOCK, BLOCK), scale=self.scale_fmt)


def scale_format(quantization: dict[str, Any]) -> Literal["fp32", "ue8m0"]:
    """How `quantization_config` says that scales are stored.

    Raises:
        ValueError: for a quantisation other than 128 x 128 blocks of e4m3, or a key that is not understood.
    """
    for name, value in quantization.items():
        if name in QUANTIZATION:
            expected = QUANTIZATION[name]
            require(
                value == expected,
                f"quantization_config {name}",
                value,
                f"must be {expected!r}",
                "use another checkpoint",
            )
        elif name == "scale_fmt":
            require(
                value in ("ue8m0", "fp32", None),
                "quantization_config scale_fmt",
                value,
                "must be ue8m0 or fp32",
                "use another checkpoint",
            )
        else:
            rule = "is not a key that this reader understands"
            require(name in IRRELEVANT, f"quantization_config {name}", value, rule, "remove it if it does not matter")
    return "ue8m0" if quantization.get("scale_fmt") == "ue8m0" else "fp32"


def check_scale(name: str, codes: Tensor, scale: Tensor) -> None:
    """Refuse a scale whose shape is not one per 128 x 128 block of the codes."""
    blocks = tuple(-(-side // BLOCK) for side in codes.shape)
    require(
        tuple(scale.shape) == blocks, f"{name}{SUFFIX}.shape", tuple(scale.shape), f"must be {blocks}", "copy it again"
    )
