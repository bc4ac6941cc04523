"""Experts as a loop of plain matrix products over sorted rows, with a backward of its own.

Autograd would keep the gathered inputs, the activations and the experts' outputs. Here x and the pre-activations h are
enough: inputs are gathered again, activations made again, and the outputs are never needed because the gate weight w is
folded into the activation.

    forward     h = x W_gate_up;   a = silu(h_gate) * h_up;   y[token] += (w a) W_down
    backward    g = dy[token] W_down^T;   dw = <g, a>;   dW_down = (w a)^T dy[token]
                dh = w g * (h_up * silu'(h_gate), silu(h_gate))
                dx[token] += dh W_gate_up^T;   dW_gate_up = x[token]^T dh

Folding w follows SonicMoE (arXiv 2512.14080). Work goes over blocks of experts, small enough that what passes from one
product to the next stays in the cache, large enough that element-wise work is not one call per expert.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.moe.memory import ReusedMemory

ROWS_PER_BLOCK = 4096


def looped_experts(
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    token: Tensor,
    counts: Tensor,
    memory: tuple[ReusedMemory, ReusedMemory] | None = None,
) -> Tensor:
    """The routed sum y [N, D], in float32 or better.

    Rows are sorted by expert: `token` [M] names the token of each, `weight` [M] its gate weight, `counts` [E] the rows
    of each expert; rows past the sum of the counts are left out. `memory` is lent to the gradients of gate_up and down.
    """
    if torch.compiler.is_compiling():
        return compiled_forward(x, weight, gate_up, down, token, counts)[0]
    return Looped.apply(x, weight, gate_up, down, token, counts, memory)


class Looped(torch.autograd.Function):
    """`forward_loop` with `backward_loop` as its gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """The routed sum; keeps h and the inputs."""
        *tensors, ctx.memory = inputs
        y, h = forward_loop(*tensors)
        ctx.save_for_backward(h, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, gate_up and down."""
        h, x, weight, gate_up, down, token, counts = ctx.saved_tensors
        for_gate_up, for_down = ctx.memory or (ReusedMemory(), ReusedMemory())
        written = for_gate_up.empty_like(gate_up), for_down.empty_like(down)
        return *backward_loop(dy, h, x, weight, gate_up, down, token, counts, *written), None, None, None


class Block(NamedTuple):
    """Neighbouring experts, their rows, and how many rows each has."""

    experts: slice
    rows: slice
    sizes: list[int]


def blocks(counts: list[int], rows: int = ROWS_PER_BLOCK) -> Iterator[Block]:
    """Split experts into runs of at least `rows` rows (the last may be shorter); an expert is never split."""
    first, start, sizes = 0, 0, list[int]()
    for expert, size in enumerate(counts):
        sizes.append(size)
        if sum(sizes) >= rows or expert == len(counts) - 1:
            stop = start + sum(sizes)
            yield Block(slice(first, expert + 1), slice(start, stop), sizes)
            first, start, sizes = expert + 1, stop, []


def forward_loop(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, token: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The routed sum y [N, D] and the pre-activations h [M, 2F]."""
    h = x.new_empty(len(token), gate_up.shape[2])
    y = torch.zeros_like(x, dtype=sum_dtype(x))
    for experts, rows, sizes in blocks(counts.tolist()):
        token_R, h_RG = token[rows], h[rows]
        multiply(x.index_select(0, token_R), gate_up[experts], sizes, h_RG)
        gate, up = h_RG.chunk(2, dim=1)
        a = F.silu(gate).mul_(up).mul_(weight[rows, None])
        y.index_add_(0, token_R, multiply(a, down[experts], sizes, x.new_empty(len(a), x.shape[1])).to(y.dtype))
    return y, h


def backward_loop(
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    token: Tensor,
    counts: Tensor,
    dgate_up: Tensor,
    ddown: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate_up and down from that of y; the last two are written into `dgate_up` and `ddown`."""
    dx, dweight = torch.zeros_like(dy), torch.zeros_like(weight)
    dy_ND = dy.to(x.dtype)
    for experts, rows, sizes in blocks(counts.tolist()):
        token_R, (gate, up), w_R1 = token[rows], h[rows].chunk(2, dim=1), weight[rows, None]
        dy_RD = dy_ND.index_select(0, token_R)
        g = multiply(dy_RD, down[experts].transpose(1, 2), sizes, x.new_empty(len(token_R), down.shape[1]))
        silu = F.silu(gate)
        a = silu * up
        dweight[rows] = torch.linalg.vecdot(g, a)
        outer(a.mul_(w_R1), dy_RD, sizes, ddown[experts])
        dh = torch.empty_like(h[rows])
        dgate, dup = dh.chunk(2, dim=1)
        torch.mul(g.mul_(w_R1), silu, out=dup)
        torch.ops.aten.silu_backward(g.mul_(up), gate, grad_input=dgate)
        x_RD = torch.index_select(x, 0, token_R, out=dy_RD)
        outer(x_RD, dh, sizes, dgate_up[experts])
        dx.index_add_(0, token_R, multiply(dh, gate_up[experts].transpose(1, 2), sizes, x_RD).to(dx.dtype))
    return dx.to(x.dtype), dweight, dgate_up, ddown


def multiply(left_RA: Tensor, weights_EAB: Tensor, sizes: list[int], out_RB: Tensor) -> Tensor:
    """Each expert's rows times its matrix, into `out_RB`."""
    for left, weight, out in zip(left_RA.split(sizes), weights_EAB.unbind(), out_RB.split(sizes), strict=True):
        if len(left):
            torch.mm(left, weight, out=out)
    return out_RB


def outer(left_RA: Tensor, right_RB: Tensor, sizes: list[int], out_EAB: Tensor) -> Tensor:
    """Each expert's sum of outer products of its rows, into `out_EAB`; zero for an expert without rows."""
    for left, right, out in zip(left_RA.split(sizes), right_RB.split(sizes), out_EAB.unbind(), strict=True):
        torch.mm(left.t(), right, out=out)
    return out_EAB


def sum_dtype(x: Tensor) -> torch.dtype:
    """What contributions are summed in: float32, or float64 for a float64 x."""
    return torch.promote_types(x.dtype, torch.float32)


# `torch.compile` would unroll the loop over experts; as operators the two passes stay one call each.


@torch.library.custom_op("dsv3::looped_experts", mutates_args=())
def compiled_forward(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, token: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """`forward_loop` as one operator."""
    return forward_loop(x, weight, gate_up, down, token, counts)


@torch.library.custom_op("dsv3::looped_experts_backward", mutates_args=())
def compiled_backward(
    dy: Tensor, h: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, token: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward_loop` as one operator."""
    dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
    return backward_loop(dy, h, x, weight, gate_up, down, token, counts, dgate_up, ddown)


@compiled_forward.register_fake
def _shapes_forward(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, token: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=sum_dtype(x)), x.new_empty(len(token), gate_up.shape[2])


@compiled_backward.register_fake
def _shapes_backward(
    dy: Tensor, h: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, token: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(gate_up), torch.empty_like(down)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *compiled_backward(dy, *ctx.saved_tensors), None, None


compiled_forward.register_autograd(_differentiate, setup_context=_keep)
