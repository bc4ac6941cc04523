"""Cases of the experts: every dispatch against transformers' grouped product and dense layers of the same FLOPs.

`bench.expert_layers` says what the arms are; `ablations/moe_speed.py` measures them over a whole grid of shapes.
"""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch

from bench.cases import Figures
from bench.expert_layers import PEER, TRUTH, Arm, Shape, build, check
from bench.measurement import Measurement
from bench.meters.flops import flops
from bench.meters.memory import peak_bytes, taken_bytes
from bench.meters.saved import saved_bytes
from bench.record import Profile

FEW_ROWS = {"quick": Shape(1024, 256, 128, 64, 2), "full": Shape(2048, 256, 128, 128, 2)}
MANY_ROWS = {"quick": Shape(512, 256, 128, 16, 4), "full": Shape(2048, 256, 128, 64, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shapes", [FEW_ROWS, MANY_ROWS], ids=["few_rows", "many_rows"])
def bench_experts(
    measure_arms: Callable[..., Figures],
    keep: Callable[..., None],
    device: torch.device,
    profile: Profile,
    shapes: Mapping[Profile, Shape],
    dtype: torch.dtype,
) -> None:
    """Forward and backward of the routed experts at few and at many rows per expert."""
    shape = shapes[profile]
    arms = build(shape, dtype, device)
    axes = {"dtype": str(dtype).removeprefix("torch."), "rows": shape.rows}
    measure_arms(
        phase="forward_backward",
        baseline=PEER,
        arms={name: arm.step for name, arm in arms.items() if name != TRUTH},
        check=lambda: check(arms, dtype),
        axes=axes,
        tokens=shape.tokens,
        flops=shape.flops,
        dtype=dtype,
    )
    for name in [name for name in arms if name != TRUTH]:
        keep(name, costs(shape, dtype, device, name), axes=axes)


def costs(shape: Shape, dtype: torch.dtype, device: torch.device, name: str) -> list[Measurement]:
    """FLOPs, bytes kept for backward, and what a step takes of memory, of one arm."""
    arm = _alone(shape, dtype, device, name)
    anew = partial(_alone, shape, dtype, device, name)
    memory = (*peak_bytes(anew, Arm.step, device=device), taken_bytes(anew, Arm.step, device=device))
    return [flops(arm.step), saved_bytes(arm.output, arm.parameters), *memory]


def _alone(shape: Shape, dtype: torch.dtype, device: torch.device, name: str) -> Arm:
    return build(shape, dtype, device, names=(name,), lend=False)[name]
