"""Floating-point formats by definition, and the exact rounding that every cast must equal.

A code is  sign | exponent field E of e bits | mantissa field M of m bits  and stands for

    (-1)^sign * 2^(E - bias) * (1 + M / 2^m)      E > 0  (normal)
    (-1)^sign * 2^(1 - bias) * (M / 2^m)          E = 0  (subnormal, zero)

The top exponent is special in one of two ways. "ieee" gives it to infinity (M = 0) and NaN: fp32, fp16, bf16, e5m2.
"fn" (finite) keeps it for numbers and reserves the code with all bits set for NaN: e4m3, which has no infinity and
448 as its largest number (arXiv 2209.05433, table 1).

Rounding is to nearest, ties to the even code. Above the largest number formats disagree: IEEE says infinity, for e4m3
both saturation and NaN are allowed, and torch has done each in some version. So `cast` clamps first: by our own rule
every cast to 8 bits saturates, and `overflows` counts what the clamp would hide.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3.config.rules import require


@dataclass(frozen=True, kw_only=True)
class Format:
    """A binary floating-point format of at most 32 bits; its properties are exact in Python floats."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Literal["ieee", "fn"]
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Width of a code: sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """The code of the largest finite number."""
        ones = (1 << (self.bits - 1)) - 1
        return ones - 1 if self.specials == "fn" else ones - (1 << self.mantissa_bits)

    @property
    def max(self) -> float:
        """Largest finite number."""
        return self.decode(self.max_code)

    @property
    def overflow_bound(self) -> float:
        """`max` and half a step: what rounds to a finite number lies below it, or on it where `max_code` is even."""
        return self.max + (self.max - self.decode(self.max_code - 1)) / 2

    @property
    def smallest_normal(self) -> float:
        """Below it, numbers lose mantissa bits."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number; half of it and everything below rounds to zero."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """From 1 to the next number: rounding moves a normal number by at most half of this, relatively."""
        return math.ldexp(1.0, -self.mantissa_bits)

    def decode(self, code: int) -> float:
        """The number that a code stands for, by the definition above.

        Raises:
            ValueError: for a code that does not fit the format's bits.
        """
        bits = self.bits
        require(0 <= code < 1 << bits, "code", code, f"must fit {bits} bits", "mask it")
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        sign = -1.0 if code >> (bits - 1) else 1.0
        top = exponent == (1 << self.exponent_bits) - 1
        if top and self.specials == "ieee":
            return math.nan if mantissa else sign * math.inf
        if top and mantissa == (1 << self.mantissa_bits) - 1:
            return math.nan
        if exponent == 0:
            return sign * math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return sign * math.ldexp((1 << self.mantissa_bits) + mantissa, exponent - self.bias - self.mantissa_bits)


E4M3 = Format(name="e4m3", exponent_bits=4, mantissa_bits=3, bias=7, specials="fn", dtype=torch.float8_e4m3fn)
E5M2 = Format(name="e5m2", exponent_bits=5, mantissa_bits=2, bias=15, specials="ieee", dtype=torch.float8_e5m2)
FP16 = Format(name="fp16", exponent_bits=5, mantissa_bits=10, bias=15, specials="ieee", dtype=torch.float16)
BF16 = Format(name="bf16", exponent_bits=8, mantissa_bits=7, bias=127, specials="ieee", dtype=torch.bfloat16)
FP32 = Format(name="fp32", exponent_bits=8, mantissa_bits=23, bias=127, specials="ieee", dtype=torch.float32)

FORMATS = (E4M3, E5M2, FP16, BF16, FP32)


def named(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: for a name that is not a format.
    """
    known = {one.name: one for one in FORMATS}
    require(name in known, "format", name, f"must be one of {', '.join(known)}", "pick one of these")
    return known[name]


def round_exact(x: Float[Tensor, "*shape"], to: Format) -> Float[Tensor, "*shape"]:
    """The nearest number of the format, ties to even, in float64 and without a cast: slow, the reference for casts.

    What is too large becomes infinity, or NaN in a format without infinities.
    """
    wide = x.double()
    fraction, exponent = torch.frexp(wide)  # |fraction| in [1/2, 1), so the leading bit is worth 2^(exponent - 1)
    step_exponent = (exponent - 1).clamp(min=1 - to.bias) - to.mantissa_bits
    # Scaling by a power of two is exact, so `round` alone rounds, and it sends ties to even. Below 2^-99 steps is zero.
    steps = torch.round(fraction * power_of_two((exponent - step_exponent).clamp(min=-99)))
    rounded = steps * power_of_two(step_exponent)
    nan = torch.full_like(wide, math.nan)
    infinity = nan if to.specials == "fn" else torch.full_like(wide, math.inf).copysign(wide)
    rounded = torch.where((rounded.abs() > to.max) | wide.isinf(), infinity, rounded)
    return torch.where(wide.isnan(), nan, rounded)


def power_of_two(exponent: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """2^exponent in float64, written into the exponent field: exact, which a library's `pow` does not promise."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def overflows(x: Float[Tensor, "*shape"], to: Format) -> Bool[Tensor, "*shape"]:
    """Which numbers would not round to a finite number of the format; NaN is no overflow, it was lost before."""
    on_the_bound_too = to.max_code % 2 == 1
    return x.abs() >= to.overflow_bound if on_the_bound_too else x.abs() > to.overflow_bound


def cast(x: Float[Tensor, "*shape"], to: Format) -> Float[Tensor, "*shape"]:
    """The codes of x in the format's torch dtype, saturating at +-max in every version of torch; NaN stays NaN."""
    return x.clamp(-to.max, to.max).to(to.dtype)
