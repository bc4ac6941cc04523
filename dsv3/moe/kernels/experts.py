"""The C++ kernel of the experts as operators that torch knows, `dsv3_experts`: forward and backward.

Each expert's rows are few, so what counts is that its weights are read once and as they lie, that SwiGLU finds its
operands in the cache, and that nothing is called per expert. Products keep 6 x 64 sums in registers, as attention's
kernel does (`dsv3/native/tiles.h`); `passes.h` says which are computed and in which layout.

x, the pre-activations h and the rows' order are kept for backward, as in `dsv3.moe.looped`, and nothing per expert. A
weight of the router stays in float32, as do all sums. The number of threads changes no bit.

Of memory a step takes the gradients of the weights, 5 F numbers a row (h, a and dh), y and dx in float32, in bfloat16
also rounded, and for each thread what a pass holds of the fullest expert. All but the gradients is under half of what
torch's grouped product takes with one thread; they are the same, so that few rows an expert bring the two closer.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dsv3.moe.memory import ReusedMemory
from dsv3.native import build

NAME = "dsv3_experts"
FORMATS = (torch.float32, torch.bfloat16)
LANES = 16  # numbers of a vector; widths are multiples of it


@torch.compiler.assume_constant_result  # the compiler runs it and keeps the answer
def why_not() -> str | None:
    """None once the operators exist; otherwise the reason why not. The first call may take a minute."""
    return _prepared()


@functools.cache
def _prepared() -> str | None:
    reason = build.why_not(NAME, Path(__file__).parent, "the experts")
    if reason is None:
        _register()
    return reason


@torch.compiler.assume_constant_result
def instruction_sets() -> tuple[str, ...]:
    """What the kernel can be told to compute with on this processor, best first; ask `why_not` before."""
    return _instruction_sets()


@functools.cache
def _instruction_sets() -> tuple[str, ...]:
    return tuple(torch.ops.dsv3_experts.instructions().split())


def fits(x: Float[Tensor, "N D"], down: Float[Tensor, "E F D"]) -> bool:
    """Whether the kernel computes these numbers and widths."""
    whole = all(width % LANES == 0 for width in down.shape[1:])
    return x.device.type == "cpu" and x.dtype in FORMATS and whole


def kernel_experts(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, " M"],
    gate_up: Float[Tensor, "E D twoF"],
    down: Float[Tensor, "E F D"],
    token: Int[Tensor, " M"],
    counts: Int[Tensor, " E"],
    memory: tuple[ReusedMemory, ReusedMemory] | None = None,
    *,
    instructions: str = "",
) -> Float[Tensor, "N D"]:
    """The routed sum in x's type, of rows as `dsv3.moe.dispatch.sort_rows` gives them.

    `memory` is lent to the gradients of gate_up and down; `instructions` names what to compute with, "" the best.

    Raises:
        RuntimeError: where the kernel cannot be built.
        ValueError: for other formats, and widths that are not whole vectors.
    """
    if why_not() is not None:
        raise RuntimeError(f"the C++ kernel of the experts is not at hand: {why_not()}")
    given = (x, weight, gate_up, down, token, counts)
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.dsv3_experts.forward(*given, instructions)[0]
        return out
    return _Experts.apply(*given, memory, instructions)


class _Experts(torch.autograd.Function):
    """The operators with memory that is lent, which a compiled graph has no use for."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, ctx.memory, ctx.instructions = given
        y, h = torch.ops.dsv3_experts.forward(*tensors, ctx.instructions)
        ctx.save_for_backward(h, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, x, weight, gate_up, down, token, counts = ctx.saved_tensors
        for_gate_up, for_down = ctx.memory or (ReusedMemory(), ReusedMemory())
        written = for_gate_up.empty_like(gate_up), for_down.empty_like(down)
        dx, dweight = torch.ops.dsv3_experts.backward_into(
            dy, h, x, weight, gate_up, down, token, counts, *written, ctx.instructions
        )
        return dx.to(x.dtype), dweight.to(weight.dtype), *written, None, None, None, None


def _register() -> None:
    """Tell torch of shapes, gradients and FLOPs: 6 D F a row forward, twice as many backward, over counted rows."""
    operators = torch.ops.dsv3_experts
    torch.library.register_fake(f"{NAME}::forward", _forward_shapes)
    torch.library.register_fake(f"{NAME}::backward", _backward_shapes)
    torch.library.register_fake(f"{NAME}::backward_into", _sums_of_backward)
    torch.library.register_autograd(f"{NAME}::forward", _differentiate, setup_context=_keep)
    register_flop_formula(operators.forward, get_raw=True)(_forward_flops)
    for backward in (operators.backward, operators.backward_into):
        register_flop_formula(backward, get_raw=True)(_backward_flops)


def _forward_shapes(x: Tensor, weight: Tensor, gate_up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(weight), gate_up.shape[2])


def _backward_shapes(dy: Tensor, h: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *_sums_of_backward(dy, h, x, weight), torch.empty_like(rest[0]), torch.empty_like(rest[1])


def _sums_of_backward(dy: Tensor, h: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), weight.new_empty(weight.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.instructions = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    h, x, weight, *rest = ctx.saved_tensors
    dx, dweight, *grads = torch.ops.dsv3_experts.backward(dy, h, x, weight, *rest, ctx.instructions)
    return dx.to(x.dtype), dweight.to(weight.dtype), *grads, None, None, None


def _forward_flops(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *rest: Any, **_: Any) -> int:
    return 6 * int(rest[1].sum()) * down.shape[1] * down.shape[2]


def _backward_flops(dy: Tensor, h: Tensor, *given: Any, **_: Any) -> int:
    return 2 * _forward_flops(*given)
