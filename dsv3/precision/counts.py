"""What a recipe does to a tensor, counted: SQNR, overflow, underflow, and the error of small values.

    SQNR        10 log10(sum x^2 / sum (x - x')^2)     x' what is left of x; about 31.5 dB for Gaussian values in e4m3
    overflow    share of the elements that exceed the format before the cast clamps them
    underflow   share of the non-zero elements that become zero
    small       mean of |x - x'| / |x| over the tenth of the non-zero elements with the smallest magnitude; 1 = all lost

SQNR alone misleads: outliers carry the energy, so a gradient may lose half of its elements at a high SQNR. Underflow
and the small-value error show that. A scale from amax leaves nothing to overflow, so there underflow is the risk.
Counts of several tensors add up; shares and dB are derived from the sums. Elements that a plain cast overflows are
clamped before noise is measured: read a plain cast's SQNR beside its overflow.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.config.rules import require
from dsv3.precision.block_scale import Recipe, dequantise, quantise, scaled
from dsv3.precision.formats import overflows


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over one or more tensors under a recipe; `small_error` is summed over `small` elements."""

    elements: int
    nonzero: int
    overflowed: int
    underflowed: int
    signal: float
    noise: float
    small: int
    small_error: float

    def __add__(self, other: "Counts") -> "Counts":
        names = self.__dataclass_fields__
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def overflow_share(self) -> float:
        """Overflowed elements over all elements."""
        return self.overflowed / max(self.elements, 1)

    @property
    def underflow_share(self) -> float:
        """Elements that became zero over those that were not zero."""
        return self.underflowed / max(self.nonzero, 1)

    @property
    def sqnr_db(self) -> float:
        """Signal over noise in dB; infinite where nothing was lost."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    @property
    def small_value_error(self) -> float:
        """Mean relative error of the smallest tenth of the non-zero elements."""
        return self.small_error / max(self.small, 1)


def count(x: Float[Tensor, "*lead M N"], recipe: Recipe) -> Counts:
    """Count what the recipe does to x.

    Raises:
        ValueError: when x has infinities or NaN: they were lost before this recipe, and would spoil every figure.
    """
    broken = int((~x.isfinite()).sum())
    require(broken == 0, "non-finite elements of x", broken, "must be 0", "count a step that was not skipped")
    quantised = quantise(x, recipe)
    before, kept = scaled(x, quantised.scale, recipe), dequantise(quantised, torch.float64)
    wide, nonzero = x.double(), x != 0
    error = (wide - kept).abs()
    small, small_error = _smallest_tenth(wide[nonzero].abs(), error[nonzero])
    return Counts(
        elements=x.numel(),
        nonzero=int(nonzero.sum()),
        overflowed=int(overflows(before, recipe.format).sum()),
        underflowed=int((nonzero & (quantised.codes.float() == 0)).sum()),
        signal=float(wide.square().sum()),
        noise=float(error.square().sum()),
        small=small,
        small_error=small_error,
    )


def _smallest_tenth(magnitude: Tensor, error: Tensor) -> tuple[int, float]:
    """How many elements the smallest tenth has, at least one of any, and the sum of their relative errors."""
    if magnitude.numel() == 0:
        return 0, 0.0
    tenth = math.ceil(magnitude.numel() / 10)
    smallest, at = magnitude.topk(tenth, largest=False, sorted=False)
    return tenth, float((error[at] / smallest).sum())
