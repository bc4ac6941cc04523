"""Block scaling: a tensor as 8-bit codes and one scale per tile, so that an outlier spoils its own tile only.

For each tile of the last two dimensions (arXiv 2412.19437 section 3.3.2: 1 x 128 for activations, 128 x 128 weights)

    scale = max(amax(|tile|), floor) / format.max          then, for "ue8m0", up to the next power of two
    code  = cast(x / scale)            x ~ code * scale

so `scale` is what a checkpoint stores as `weight_scale_inv`: the factor that gives the value back. Rounding it up
(DeepSeek-V3.1's ue8m0: 8 exponent bits, no sign, no mantissa) keeps |x / scale| <= format.max, so that no code
overflows, and makes the multiplication exact; it costs up to one binade of range at the small end.

A tile at the edge of a shape that it does not divide is a smaller tile; no result is padded. A tile with an infinity or
a NaN becomes NaN as a whole, because the scale carries it: an overflow upstream must not turn into plausible numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dsv3.config.precision import Float8Block
from dsv3.config.rules import require
from dsv3.precision.formats import Format, cast, named, power_of_two

Scale = Literal["none", "fp32", "ue8m0"]

PUBLISHED_FLOOR = 1e-4
# Gradients of a mean over many tokens are often smaller than the published floor, which would push their codes into the
# subnormals. This floor only keeps the scale a normal fp32 number: 2^-100 / 57344 is about 2^-116.
GRADIENT_FLOOR = 2.0**-100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a tensor becomes codes. A tile side of None is the whole dimension; `scale="none"` is a plain cast."""

    format: Format
    tile: tuple[int | None, int | None] = (None, None)
    scale: Scale = "fp32"
    floor: float = PUBLISHED_FLOOR

    def __post_init__(self) -> None:
        sides = all(side is None or side >= 1 for side in self.tile)
        require(sides, "tile", self.tile, "its sides are 1 or more, or None", "write e.g. tile=(1, 128)")
        require(self.floor > 0, "floor", self.floor, "must be above 0: a tile of zeros needs a scale", "use 1e-4")

    def transposed(self) -> "Recipe":
        """The same tiles of the transposed tensor."""
        return Recipe(format=self.format, tile=self.tile[::-1], scale=self.scale, floor=self.floor)


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """What the three products of a linear layer use; each is scaled along the dimension that its product sums over.

    `activation` and `gradient` are tiles of [token, feature] as forward and dgrad read them; wgrad sums over tokens and
    reads both with the tiles transposed. `weight` is square, so one set of codes serves forward and dgrad.
    """

    activation: Recipe
    weight: Recipe
    gradient: Recipe


def recipes(precision: Float8Block) -> Recipes:
    """The recipes of a precision: 1 x block for activations and gradients, block x block for weights."""
    form, block, scale = named(precision.format), precision.block, precision.scale
    return Recipes(
        activation=Recipe(format=form, tile=(1, block), scale=scale),
        weight=Recipe(format=form, tile=(block, block), scale=scale),
        gradient=Recipe(format=form, tile=(1, block), scale=scale, floor=GRADIENT_FLOOR),
    )


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A tensor as codes in its format, and fp32 scales of m = ceil(M / rows) by n = ceil(N / columns) tiles."""

    codes: Float[Tensor, "*lead M N"]
    scale: Float[Tensor, "*lead m n"]
    recipe: Recipe


def quantise(x: Float[Tensor, "*lead M N"], recipe: Recipe) -> Quantised:
    """Codes and scales of x, computed in fp32; leading dimensions are separate tensors."""
    scale = scales(x, recipe)
    return Quantised(codes=cast(scaled(x, scale, recipe), recipe.format), scale=scale, recipe=recipe)


def dequantise(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lead M N"]:
    """code * scale in fp32, exact for power-of-two scales and rounded once otherwise; then in the given dtype."""
    codes, scale = quantised.codes.float(), quantised.scale
    values = codes if quantised.recipe.scale == "none" else _each_tile(codes, scale, quantised.recipe, torch.mul)
    return values.to(dtype)


def round_trip(x: Float[Tensor, "*lead M N"], recipe: Recipe) -> Float[Tensor, "*lead M N"]:
    """What is left of x after its codes: quantised, dequantised, in x's dtype."""
    return dequantise(quantise(x, recipe), x.dtype)


def scales(x: Float[Tensor, "*lead M N"], recipe: Recipe) -> Float[Tensor, "*lead m n"]:
    """The scale of each tile of x; ones for a plain cast."""
    assert x.dim() >= 2, f"x.dim()={x.dim()}: tiles lie in the last two dimensions"
    amax = _tiles(x.float(), *_sides(x.shape, recipe)).abs().amax(dim=(-3, -1))
    if recipe.scale == "none":
        return torch.ones_like(amax)
    scale = amax.clamp(min=recipe.floor) / recipe.format.max
    return round_up(scale) if recipe.scale == "ue8m0" else scale


def round_up(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The smallest power of two that is not below each positive scale; infinity and NaN stay."""
    fraction, exponent = torch.frexp(scale)
    power = power_of_two(exponent - (fraction == 0.5).int()).to(scale.dtype)
    return torch.where(scale.isfinite(), power, scale)


def scaled(
    x: Float[Tensor, "*lead M N"], scale: Float[Tensor, "*lead m n"], recipe: Recipe
) -> Float[Tensor, "*lead M N"]:
    """x / scale in fp32, as it stands before the cast: what overflows and what underflows is decided here."""
    return x.float() if recipe.scale == "none" else _each_tile(x.float(), scale, recipe, torch.div)


def _each_tile(x: Tensor, scale: Tensor, recipe: Recipe, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rows, columns = _sides(x.shape, recipe)
    whole = operation(_tiles(x, rows, columns), scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)
    return whole[..., : x.shape[-2], : x.shape[-1]]


def _tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """x as [..., m, rows, n, columns], filled up with zeros to whole tiles: they change no maximum of magnitudes."""
    below, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    whole = functional.pad(x, (0, right, 0, below)) if below or right else x
    m, n = whole.shape[-2] // rows, whole.shape[-1] // columns
    return whole.unflatten(-1, (n, columns)).unflatten(-3, (m, rows))


def _sides(shape: torch.Size, recipe: Recipe) -> tuple[int, int]:
    """The tile's sides inside this shape: a side never exceeds its dimension, and an empty dimension has no tile."""
    rows, columns = (
        max(1, size if side is None else min(side, size)) for side, size in zip(recipe.tile, shape[-2:], strict=True)
    )
    return rows, columns
