"""Floating-point operations of a call, counted as it runs: 2 m n k for each matrix product.

torch's FlopCounterMode counts nothing for two products that this project lives on: grouped_mm (the experts) and the CPU
kernel of scaled dot-product attention. Their formulas stand here. Attention counts as dense, causal or not, and its
fused backward counts the scores that it computes again, as torch does for its GPU kernels. So the plain path of a
selection counts the rectangles that it multiplies, what is masked in them included; the C++ kernel counts the pairs
that the selection lets through (`dsv3.attention.kernels.flops`), as `dsv3.model.cost` does. Scores by which keys are
chosen are products that no operator shows: `bench.meters.scores` counts them.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bench.measurement import Measurement

Formula = Callable[..., int]


def grouped_mm_flops(a_shape: Sequence[int], b_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Rows of `a`, split in groups, each times its group's matrix: every row, or every summed column, is used once.

    Right where the offsets cover all rows, as a dropless layer's do.
    """
    groups = a_shape[0] if len(a_shape) == len(b_shape) == 3 else 1
    return 2 * groups * a_shape[-2] * a_shape[-1] * b_shape[-1]


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and their product with the values, [B, H, T, P] x [B, H, S, P] x [B, H, S, R]."""
    return int(sdpa_flop_count(q, k, v))


def attention_backward_flops(
    gradient: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any
) -> int:
    """Scores again, and the four products of the gradients."""
    return int(sdpa_backward_flop_count(gradient, q, k, v))


def formulas() -> dict[Any, Formula]:
    """What torch does not count, by operator."""
    aten = torch.ops.aten
    return {
        aten._grouped_mm: grouped_mm_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }


def flops(
    call: Callable[[], object], *, metric: str = "flops", more: Mapping[Any, Formula] | None = None
) -> Measurement:
    """Operations of one call, forward and backward alike, as metric flops, forward_flops or backward_flops.

    `more` gives the formula of an operator of one's own: torch.ops.<namespace>.<name> -> f(shapes of its arguments).
    A compiled call is not seen through; count its eager twin.
    """
    counter = FlopCounterMode(display=False, custom_mapping=formulas() | dict(more or {}))
    # torch's own formulas as they are, not as they were: the first call of the C++ kernel brings those of the kernel
    counter.flop_registry = ChainMap(counter.flop_registry, flop_registry)  # type: ignore[assignment]
    with counter:
        call()
    return Measurement(metric=metric, value=int(counter.get_total_flops()))
