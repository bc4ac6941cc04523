"""What torch is told of a kernel's two operators, whoever computes them: shapes, gradients, FLOPs.

    out, lse = NAME::forward(q, k, v, selection..., own...)          lse: the logarithm of each row's denominator
    grad_q, grad_k, grad_v, grad_weights, grad_bias = NAME::backward(grad, q, k, v, out, lse, selection..., own...)

`selection...` is indices, counts, block_q, block_k, scale, weights, rank, limit and bias, `own...` what a kernel asks
besides. Gradients of the weights and the bias come apart for heads that share them, as many as suit the kernel. A bias
belongs to lists that stand in order, so a call orders them where torch still sees it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3.attention.kernels import flops
from dsv3.attention.selection import Selection, tidy

Arguments = tuple[Any, ...]
FORMATS = (torch.float32, torch.bfloat16)  # that the kernels compute in


def arguments(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, scale: float) -> Arguments:
    """What both operators take of a call of `attend`: in the format of autocast; no selection: every key."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if selection is None:
        return q, k, v, None, None, 64, 64, scale, None, None, None, None
    if selection.bias is not None:
        selection = tidy(selection, q.shape[2], k.shape[2])
    lists = (selection.indices, selection.counts, selection.block_q, selection.block_k)
    return q, k, v, *lists, scale, selection.weights, selection.rank, selection.limit, selection.bias


def register(name: str, weight_heads: Callable[[Tensor, Tensor, Tensor], int]) -> None:
    """Tell torch of `name`::forward and `name`::backward, which must exist. `weight_heads` says from q, k and the
    weights for how many heads backward returns a gradient of the weights.
    """

    def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        weights = rest[7]
        batch, heads = (0, q.shape[1]) if weights is None else (q.shape[0], weight_heads(q, k, weights))
        grads = (x.new_empty(x.shape) for x in (q, k, v))
        bias = (0, q.shape[1], 0, 0) if rest[10] is None else (*q.shape[:2], *rest[10].shape[2:])
        sums = (q.new_empty(shape, dtype=torch.float32) for shape in ((batch, heads, k.shape[2]), bias))
        return *grads, *sums

    def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(operators.backward, ctx, grad)

    operators = getattr(torch.ops, name)
    torch.library.register_fake(f"{name}::forward", _results)
    torch.library.register_fake(f"{name}::backward", gradients)
    torch.library.register_autograd(f"{name}::forward", differentiate, setup_context=_keep)
    torch.library.register_autograd(f"{name}::backward", _differentiate_twice)
    flops.register(operators)


def _results(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, counts, block_q, block_k, scale, weights, rank, limit, bias, *own = inputs
    ctx.save_for_backward(q, k, v, *output, indices, counts, weights, rank, limit, bias)
    ctx.sizes, ctx.own = (block_q, block_k, scale), own
    ctx.mark_non_differentiable(output[1])


def _differentiate(backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, indices, counts, weights, rank, limit, bias = ctx.saved_tensors
    selected = (indices, counts, *ctx.sizes, weights, rank, limit, bias, *ctx.own)
    *grads, grad_w, grad_b = backward(grad, q, k, v, out, lse, *selected)
    grad_w, grad_b = _shared(grad_w, weights), _shared(grad_b, bias)
    return *grads, *[None] * 5, grad_w, None, None, grad_b, *[None] * len(ctx.own)


def _shared(grad: Tensor, given: Tensor | None) -> Tensor | None:
    """The gradient of what heads that share a selection share."""
    return None if given is None else grad.unflatten(1, (given.shape[1], -1)).sum(2).to(given.dtype)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("attention to a selection has no second derivative, in none of the implementations")
