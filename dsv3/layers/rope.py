"""Rotary position embedding on interleaved pairs, and YaRN for contexts longer than trained on.

RoPE (arXiv 2104.09864) turns the pair (x[2i], x[2i+1]) at position p by the angle p * f_i, f_i = theta^(-2i/dim), so
that a dot product of a turned query and a turned key depends on the distance of their positions only. Angles and the
turn are computed in fp32 (float64 stays float64).

YaRN (arXiv 2309.00071) divides slow frequencies by `factor`, keeps fast ones and blends between, where fast means at
least `beta_fast` turns over the original context and slow at most `beta_slow`:

    corr(r) = dim * ln(original / (2 pi r)) / (2 ln theta)          the pair that turns r times
    ramp_i = clamp((i - low) / (high - low), 0, 1)                  low = floor(corr(fast)), high = ceil(corr(slow))
    f_i <- f_i / factor * ramp_i + f_i * (1 - ramp_i)
    m(s) = 0.1 s ln(factor) + 1

The softmax scale grows by m(mscale_all_dim)^2 and the turned vectors by m(mscale) / m(mscale_all_dim), which is 1 for
DeepSeek-V3, as its published code has it: 1.8738542 and 1 at factor 40.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config import Rope, Yarn
from dsv3.config.rules import require


def frequencies(dim: int, rope: Rope, device: torch.device | str = "cpu") -> Float[Tensor, " half"]:
    """The angle per position of each of the dim/2 pairs, in fp32.

    Raises:
        ValueError: when `dim` is odd or not positive.
    """
    require(dim > 0 and dim % 2 == 0, "dim", dim, "must be even: rotary embedding turns pairs", "use an even width")
    plain = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if rope.scaling is None:
        return plain
    ramp = _ramp(dim, rope.theta, rope.scaling, device)
    return plain / rope.scaling.factor * ramp + plain * (1 - ramp)


def softmax_mscale(rope: Rope) -> float:
    """What the softmax scale is multiplied by: m(mscale_all_dim)^2 under YaRN, else 1."""
    if rope.scaling is None or rope.scaling.mscale_all_dim == 0:
        return 1.0
    return _m(rope.scaling, rope.scaling.mscale_all_dim) ** 2


def magnitude(rope: Rope) -> float:
    """What turned vectors are multiplied by under YaRN: m(mscale) / m(mscale_all_dim), or m(1) when either is 0."""
    yarn = rope.scaling
    if yarn is None:
        return 1.0
    if yarn.mscale == 0 or yarn.mscale_all_dim == 0:
        return _m(yarn, 1.0)
    return _m(yarn, yarn.mscale) / _m(yarn, yarn.mscale_all_dim)


def rotate(
    x: Float[Tensor, "*batch T P"],
    positions: Int[Tensor, " T"],
    frequency: Float[Tensor, " half"],
    magnitude: float = 1.0,
) -> Float[Tensor, "*batch T P"]:
    """Turn the pairs (2i, 2i+1) of x's last axis by positions * frequency; pairs stay where they are.

    Hugging Face's readers return [all firsts; all seconds] instead. Dot products agree, element by element the vectors
    do not.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angle_TP2 = positions.to(wide)[:, None] * frequency.to(wide)
    pair = x.to(wide).unflatten(-1, (-1, 2))
    # in eager mode one complex product is four times faster; the compiler generates code for the real form only
    turn = _turn if torch.compiler.is_compiling() else _turn_complex
    return turn(pair, angle_TP2, magnitude).flatten(-2).to(x.dtype)


def rotate_halves(
    x: Float[Tensor, "*batch T P"],
    positions: Int[Tensor, " T"],
    frequency: Float[Tensor, " half"],
    magnitude: float = 1.0,
) -> Float[Tensor, "*batch T P"]:
    """The same turn of the pairs (i, i + P/2): Llama's layout, and that of DeepSeek-V3.2's indexer."""
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    turned = rotate(pairs, positions, frequency, magnitude)
    return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _turn(pair: Float[Tensor, "*batch T half 2"], angle: Float[Tensor, "T half"], magnitude: float) -> Tensor:
    cos, sin = angle.cos() * magnitude, angle.sin() * magnitude
    first, second = pair.unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)


def _turn_complex(pair: Float[Tensor, "*batch T half 2"], angle: Float[Tensor, "T half"], magnitude: float) -> Tensor:
    if pair.storage_offset() % 2 or any(stride % 2 for stride in pair.stride()[:-1]):
        pair = pair.contiguous()  # a complex view needs pairs at even addresses
    turn = torch.polar(torch.full_like(angle, magnitude), angle)
    return torch.view_as_real(torch.view_as_complex(pair) * turn)


def _m(yarn: Yarn, scale: float) -> float:
    return 0.1 * scale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


def _ramp(dim: int, theta: float, yarn: Yarn, device: torch.device | str) -> Float[Tensor, " half"]:
    def pair_with(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)
    return ((pair - low) / width).clamp(0, 1)
