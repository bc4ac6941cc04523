"""Dynamic loss scaling: a factor keeps fp16 gradients out of underflow, and trial keeps the factor out of overflow.

    backward of (loss * scale);  gradient / scale         (arXiv 1710.03740 section 3.2)
    a gradient is not finite      skip the step, scale / 2
    `growth_interval` good steps  scale * 2

The state is a value: a step takes one and returns the next, a checkpoint stores its numbers, and every skipped step is
counted under its reason. It moves as `torch.amp.GradScaler` does, step by step, but for one thing: where the scaler
would halve for ever (a NaN in the weights makes every gradient NaN), this stops with an error.

At the limit, when the gradients allow no larger scale, one step in `growth_interval` + 1 is skipped: 0.05% for 2000.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch
from torch import Tensor

from dsv3.config.precision import BFloat16, Float8Block, Float16, Float32, Precision
from dsv3.precision.formats import FP32

GROWTH = 2.0
BACKOFF = 0.5
# fp16 spans 40 binades. Where gradients are not finite even after a division by 2^24, the scale is not the reason.
SMALLEST = 2.0**-24

Reason = Literal["infinite gradient", "NaN gradient"]


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """The factor, how it moves, and what was skipped so far."""

    scale: float
    growth_interval: int
    good_steps: int = 0
    skipped_infinite: int = 0
    skipped_nan: int = 0

    @property
    def skipped(self) -> dict[Reason, int]:
        """Skipped steps by reason."""
        return {"infinite gradient": self.skipped_infinite, "NaN gradient": self.skipped_nan}


def initial(precision: Precision) -> LossScale | None:
    """The state that a run of this precision starts with; None where losses are not scaled."""
    match precision:
        case Float16():
            return LossScale(scale=precision.init_scale, growth_interval=precision.growth_interval)
        case Float32() | BFloat16() | Float8Block():
            return None
        case _:
            assert_never(precision)


def unscale(gradients: Iterable[Tensor], state: LossScale) -> Reason | None:
    """Divide the gradients by the scale, in place; the reason why their step must be skipped, or None.

    Call it after gradients were summed over ranks: an infinity on one rank is then one on all, and all skip together.
    (Infinities of opposite sign sum to NaN, so "NaN gradient" may be an overflow too.)
    """
    found = list(gradients)
    for gradient in found:
        gradient.mul_(1.0 / state.scale)
    # One flag per tensor and one read of all: on an accelerator each read waits for the queue.
    if not found or bool(torch.stack([gradient.isfinite().all() for gradient in found]).all()):
        return None
    return "NaN gradient" if any(bool(gradient.isnan().any()) for gradient in found) else "infinite gradient"


def update(state: LossScale, reason: Reason | None) -> LossScale:
    """The state after a step that was taken (None) or skipped for a reason.

    Raises:
        FloatingPointError: when the scale has fallen so low that overflow cannot be what breaks the gradients.
    """
    if reason is None:
        return _grow(replace(state, good_steps=state.good_steps + 1))
    scale = state.scale * BACKOFF
    if scale < SMALLEST:
        raise FloatingPointError(
            f"{reason} at loss scale {state.scale:g} after {sum(state.skipped.values())} skipped steps: the scale is "
            "not the cause; look for a NaN in weights or data, lower the learning rate, or train in bf16"
        )
    nan = reason == "NaN gradient"
    return replace(
        state,
        scale=scale,
        good_steps=0,
        skipped_infinite=state.skipped_infinite + (not nan),
        skipped_nan=state.skipped_nan + nan,
    )


def _grow(state: LossScale) -> LossScale:
    if state.good_steps < state.growth_interval:
        return state
    grown = state.scale * GROWTH
    return replace(state, scale=grown if grown <= FP32.max else state.scale, good_steps=0)
