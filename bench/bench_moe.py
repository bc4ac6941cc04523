"""Cases of the experts: every dispatch against transformers' grouped product and a dense network of the same FLOPs.

All arms get the same tokens, the same routing (uniform, K distinct experts a token) and the same weights, each in the
layout it likes. The routing is given, so the router's own cost is left out; sorting and combining are in.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bench.cases import Figures
from bench.measurement import Measurement
from bench.meters.flops import flops
from bench.meters.memory import peak_bytes
from bench.meters.saved import saved_bytes
from bench.record import Profile
from dsv3.layers import SwiGLU
from dsv3.moe import Routing
from dsv3.moe.dispatch import Dispatch, grouped, looped, reference
from dsv3.moe.memory import ReusedMemory
from dsv3.moe.routing import count

PEER = "transformers grouped_mm"
DENSE = "dense, same FLOPs"
TRUTH = "reference"
DISPATCHES: Mapping[str, Dispatch] = {"looped": looped, "grouped": grouped, TRUTH: reference}


@dataclass(frozen=True)
class Shape:
    """N tokens of width D to K of E experts of width F."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int


FEW_ROWS = {"quick": Shape(2048, 256, 128, 128, 2), "full": Shape(2048, 256, 128, 128, 2)}
MANY_ROWS = {"quick": Shape(512, 256, 128, 16, 4), "full": Shape(2048, 256, 128, 64, 8)}


class Arm:
    """Something with parameters that turns tokens into tokens; `transposed` says that it stores outputs first."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        x: Tensor,
        *,
        transposed: bool = False,
    ) -> None:
        self.forward = forward
        self.parameters = tuple(parameters)
        self.x = x.clone().requires_grad_()
        self.toward = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        self.transposed = transposed

    def output(self) -> Tensor:
        """Forward alone."""
        return self.forward(self.x)

    def step(self) -> Tensor:
        """Forward and backward, without gradients of an earlier call."""
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None
        y = self.output()
        y.backward(self.toward)
        return y

    def results(self) -> list[Tensor]:
        """Output and gradients, those of the experts' weights inputs first."""
        y = self.step()
        gradients = [tensor.grad for tensor in (self.x, *self.parameters) if tensor.grad is not None]
        turned = [gradient.transpose(1, 2) if self.transposed else gradient for gradient in gradients[1:]]
        return [y, gradients[0], *turned]


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
    axes = {"dtype": str(dtype).removeprefix("torch."), "rows": shape.tokens * shape.k // shape.experts}
    measure_arms(
        phase="forward_backward",
        baseline=PEER,
        arms={name: arm.step for name, arm in arms.items() if name != TRUTH},
        check=lambda: check(arms, dtype),
        axes=axes,
        tokens=shape.tokens,
        flops=18 * shape.tokens * shape.k * shape.hidden * shape.inner,
        dtype=dtype,
    )
    for name in [name for name in arms if name != TRUTH]:
        keep(name, costs(shape, dtype, device, name), axes=axes)


def check(arms: Mapping[str, Arm], dtype: torch.dtype) -> None:
    """Outputs and gradients of every routed arm equal the reference's; the dense network is another function."""
    truth = arms[TRUTH].results()
    for name, arm in arms.items():
        if name in (TRUTH, DENSE):
            continue
        for found, right in zip(arm.results(), truth, strict=True):
            # Sums of a few hundred products in other orders, and a handful of roundings to the type on the way.
            bound = 8 * torch.finfo(dtype).eps * arm.x.shape[1] ** 0.5 * right.abs().max().item()
            torch.testing.assert_close(found, right, rtol=0.0, atol=bound, msg=partial("{}: {}".format, name))


def costs(shape: Shape, dtype: torch.dtype, device: torch.device, name: str) -> list[Measurement]:
    """FLOPs, bytes kept for backward, and peak bytes and allocations of one arm."""
    arm = build(shape, dtype, device)[name]
    memory = peak_bytes(lambda: build(shape, dtype, device, lend=False)[name], Arm.step, device=device)
    return [flops(arm.step), saved_bytes(arm.output, arm.parameters), *memory]


def build(shape: Shape, dtype: torch.dtype, device: torch.device, *, lend: bool = True) -> dict[str, Arm]:
    """All arms, the baseline first. `lend`: the loop gets its memory back in the next call, as in training.

    For counting bytes it must not, since memory that is kept is not seen to be taken.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape.tokens, shape.hidden, generator=random).to(device, dtype)
    indices = torch.rand(shape.tokens, shape.experts, generator=random).topk(shape.k).indices.to(device)
    weights = torch.rand(shape.tokens, shape.k, generator=random).to(device)
    routing = Routing(indices, weights, weights.new_ones(shape.tokens, shape.experts), count(indices, shape.experts))
    gate_up = torch.randn(shape.experts, shape.hidden, 2 * shape.inner, generator=random) / shape.hidden**0.5
    down = torch.randn(shape.experts, shape.inner, shape.hidden, generator=random) / shape.inner**0.5
    gate_up, down = gate_up.to(device, dtype), down.to(device, dtype)
    arms = {PEER: _peer(shape, routing, gate_up, down, x)}
    arms |= {name: _ours(dispatch, routing, gate_up, down, x, lend) for name, dispatch in DISPATCHES.items()}
    dense = SwiGLU(shape.hidden, shape.k * shape.inner).to(device, dtype)
    return arms | {DENSE: Arm(dense, dense.parameters(), x)}


def _ours(dispatch: Dispatch, routing: Routing, gate_up: Tensor, down: Tensor, x: Tensor, lend: bool) -> Arm:
    stacked = nn.Parameter(gate_up.clone()), nn.Parameter(down.clone())
    if dispatch is looped and lend:
        memory = ReusedMemory(), ReusedMemory()
        return Arm(lambda rows: looped(rows, routing, *stacked, memory), stacked, x)
    return Arm(lambda rows: dispatch(rows, routing, *stacked), stacked, x)


def _peer(shape: Shape, routing: Routing, gate_up: Tensor, down: Tensor, x: Tensor) -> Arm:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.k,
    )
    config._experts_implementation = "grouped_mm"
    experts = DeepseekV3Experts(config).to(x)
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
        experts.down_proj.copy_(down.transpose(1, 2))
    weights = routing.weights.to(x)
    return Arm(lambda rows: experts(rows, routing.indices, weights), experts.parameters(), x, transposed=True)
