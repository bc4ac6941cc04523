"""Cases of the experts: every dispatch against transformers' grouped product and dense layers of the same FLOPs, and
what placing experts on ranks by past loads takes off the busiest one.

`bench.expert_layers` says what the dispatches are; `ablations/moe_speed.py` measures them over a whole grid of shapes.
Placements are of `bench.placed_loads`: counts, with no clock; `ablations/routing_workloads.py` has them over seeds.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from bench.cases import Figures, Run
from bench.expert_layers import PEER, TRUTHS, Arm, Shape, build, check
from bench.measurement import Measurement, Point
from bench.meters.flops import flops
from bench.meters.memory import memory
from bench.meters.saved import saved_bytes
from bench.placed_loads import BASELINE, busiest_rank
from bench.record import Profile
from bench.routing_workloads import NAMES, Workload
from bench.workload_sizes import CHOSEN, PLACED, TOKENS

FEW_ROWS = {"quick": Shape(256, 256, 128, 16, 2), "full": Shape(2048, 256, 128, 128, 2)}
MANY_ROWS = {"quick": Shape(256, 256, 128, 4, 2), "full": Shape(2048, 256, 128, 64, 8)}


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
        arms={name: arm.step for name, arm in arms.items() if name not in TRUTHS},
        check=lambda: check(arms, dtype),
        axes=axes,
        tokens=shape.tokens,
        flops=shape.flops,
        dtype=dtype,
    )
    for name in [name for name in arms if name not in TRUTHS]:
        keep(name, costs(shape, dtype, device, name), axes=axes)


def costs(shape: Shape, dtype: torch.dtype, device: torch.device, name: str) -> list[Measurement]:
    """FLOPs, bytes kept for backward, and what a step takes of memory, of one arm."""
    arm = _alone(shape, dtype, device, name)
    anew = partial(_alone, shape, dtype, device, name)
    kept = saved_bytes(arm.output, arm.parameters)
    return [flops(arm.step), kept, *memory(anew, Arm.step, device=device)]


def _alone(shape: Shape, dtype: torch.dtype, device: torch.device, name: str) -> Arm:
    return build(shape, dtype, device, names=(name,), lend=False)[name]


@pytest.mark.parametrize("workload", NAMES)
@pytest.mark.parametrize("spare", ["none", "an_eighth"])
def bench_placement(
    keep: Callable[..., None], run: Run, benchmark: Any, profile: Profile, workload: str, spare: str
) -> None:
    """The busiest rank with experts in their order, placed by past loads, and placed as if the step were known."""
    shape = PLACED[profile]
    redundant = 0 if spare == "none" else shape.experts // 8
    given = Workload(name=workload, tokens=TOKENS[profile], experts=shape.experts, k=CHOSEN)
    axes: dict[str, str | int | float] = {"workload": workload, "experts": shape.experts, "ranks": shape.ranks}
    axes["redundant"] = redundant
    try:
        found = benchmark.pedantic(busiest_rank, args=(given, shape, redundant), rounds=1)
    except AssertionError as error:
        point = Point(study=__name__.rpartition(".")[2], arm=BASELINE, axes=axes | {"device": run.device})
        run.keep_failures(point, ["busiest_rank_load"], str(error))
        raise
    for arm, value in found.items():
        baseline = None if arm == BASELINE else BASELINE
        keep(arm, [Measurement(metric="busiest_rank_load", value=value)], baseline=baseline, axes=axes)
