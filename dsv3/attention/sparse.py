"""Attention over selected keys in plain PyTorch: a loop over blocks of queries, each with the keys its selection lists.

    for each block of queries:   gather the listed keys and values (a run of neighbours is sliced instead)
                                 penalty = 0 where j <= t and rank[j] <= limit[t], else far below
                                 softmax(scale * q k^T + added + penalty) v, torch's fused kernel on the small block
                                 added: the weight of a key, the bias of its block
    a query that sees no key:    0, and no gradient; its softmax, over penalties alone, lies far below any other

What is added to a key's logits rides along as one more column of k against a one in q: the fused kernel has a gradient
for k, none for a matrix that is added. Backward adds each block's part into gradients allocated once, so memory beyond
inputs and outputs is one block's, and no T x S matrix exists. What is in a block, in which order, and its penalty are
decided by tokens that its queries may see, so nothing later moves a bit of an output.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsv3.attention import fused
from dsv3.attention.dense import same_width
from dsv3.attention.query_blocks import UNSEEN, QueryBlock, query_blocks
from dsv3.attention.selection import Selection, tidy
from dsv3.config.rules import require

LONGEST = 2**24  # numbers up to which fp32 counts exactly
TENSORS = ("indices", "counts", "rank", "limit")


@torch.compiler.disable  # a loop over blocks of sizes that differ, around a kernel that is fused already
def sparse(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    v: Float[Tensor, "B G S R"],
    selection: Selection,
    *,
    scale: float,
) -> Float[Tensor, "B H T R"]:
    """Attention of the last T of S positions to the selected keys; gradients reach q, k, v, the weights and the bias.

    Raises:
        ValueError: for positions or ranks that fp32 cannot count, or lists that name blocks which do not exist.
    """
    rule = f"must be at most {LONGEST}: ranks are compared in fp32"
    require(k.shape[2] <= LONGEST, "positions", k.shape[2], rule, "attend to a shorter sequence")
    selection = _countable(tidy(selection, q.shape[2], k.shape[2]))
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    weights, bias = (None if x is None else x.to(q.dtype) for x in (selection.weights, selection.bias))
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))  # rows in one piece each, to be gathered
    return _Sparse.apply(q, k, v, weights, bias, replace(selection, weights=None, bias=None), scale)


def pairs(q: Float[Tensor, "B H T P"], selection: Selection, total: int) -> int:
    """How many pairs of a query and a key the selection lets through, over batch and query heads; looks at each."""
    selection = _countable(tidy(selection, q.shape[2], total))
    penalties = (block.penalty for block in query_blocks(selection, q, total, 1))
    return sum(int((penalty == 0).sum()) * (q.shape[1] // penalty.shape[1]) for penalty in penalties)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        selection: Selection,
        scale: float,
    ) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        for block in query_blocks(selection, q, k.shape[2], _key_bytes(k, v, selection)):
            found, logs = fused.forward(*_operands(q, k, v, weights, bias, block, scale), block.penalty, scale)
            block.put(out, found[..., : v.shape[-1]])
            # where a kernel keeps it to itself, the best penalty takes its place: as far below where nothing is seen
            block.put(lse, block.penalty.amax(dim=-1).expand(found.shape[:-1]) if logs is None else logs)
        out.masked_fill_(_sees_nothing(lse), 0)
        ctx.save_for_backward(q, k, v, weights, bias, out, lse, *(getattr(selection, name) for name in TENSORS))
        ctx.plain, ctx.scale = {name: getattr(selection, name) for name in ("block_q", "block_k", "cost")}, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, bias, out, lse, *tensors = ctx.saved_tensors
        selection = Selection(**ctx.plain, **dict(zip(TENSORS, tensors, strict=True)))
        # not zeros_like: a transposed input would pass its strides on, and rows must lie one after the other
        grad_q, grad_k, grad_v = torch.empty_like(q), k.new_zeros(k.shape), v.new_zeros(v.shape)
        blind = _sees_nothing(lse)
        if bool(blind.any()):
            grad, grad_q = grad.masked_fill(blind, 0), torch.zeros_like(q)
        grad_w, grad_b = (None if x is None else x.new_zeros(x.shape) for x in (weights, bias))
        for block in query_blocks(selection, q, k.shape[2], _key_bytes(k, v, selection)):
            operands, heads = _operands(q, k, v, weights, bias, block, ctx.scale), block.heads(q, k)
            pad = (0, operands[0].shape[-1] - out.shape[-1])
            rows, done = (F.pad(block.cut(x, heads), pad) for x in (grad, out))
            part_q, part_k, part_v = fused.backward(
                rows, *operands, block.penalty, ctx.scale, done, block.cut(lse, heads)
            )
            block.put(grad_q, part_q[..., : q.shape[-1]])
            _give_back(grad_k, part_k[..., : k.shape[-1]], block)
            _give_back(grad_v, part_v[..., : v.shape[-1]], block)
            if grad_w is not None:
                _give_back(grad_w[..., None], part_k[..., k.shape[-1], None] / ctx.scale, block)
            if grad_b is not None:
                _give_back_bias(grad_b, part_k[..., k.shape[-1]] / ctx.scale, block)
        return grad_q, grad_k, grad_v, grad_w, grad_b, None, None


def _sees_nothing(lse: Float[Tensor, "B H T"]) -> Bool[Tensor, "B H T 1"]:
    return (lse < -UNSEEN / 2)[..., None]


def _countable(selection: Selection) -> Selection:
    """Ranks and limits that fp32 compares exactly: limits beyond the largest rank all say the same."""
    if selection.rank is None or selection.limit is None:
        return selection
    ends = (*selection.rank.aminmax(), *selection.limit.aminmax())
    low, high, least, most = torch.stack([end.long() for end in ends]).tolist()  # the host waits once
    rule = f"must be between {-LONGEST} and {LONGEST}: ranks are compared in fp32"
    require(low >= -LONGEST and high <= LONGEST, "selection.rank", (low, high), rule, "number the keys in their order")
    if least >= -LONGEST and most <= LONGEST:
        return selection
    limit = selection.limit.clamp(max=LONGEST)
    return replace(selection, limit=limit.masked_fill(limit < -LONGEST, -2 * LONGEST))


def _operands(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, bias: Tensor | None, block: QueryBlock, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's queries, keys and values, all of one width; what is added to logits is a column behind the key."""
    heads = block.heads(q, k)
    rows, keys = block.cut(q, heads), _take(k, block, heads)
    # absorbed latent attention has one tensor for both
    one = k.data_ptr() == v.data_ptr() and k.shape == v.shape and k.stride() == v.stride()
    values = keys if one else _take(v, block, heads)
    added = None if weights is None else _take(weights[..., None], block, heads)
    if bias is not None:
        of_block = _take_bias(bias, block, heads)
        added = of_block if added is None else added + of_block
    if added is not None:
        keys = torch.cat((keys, added / scale), dim=-1)
        rows = F.pad(rows, (0, 1), value=1.0)
    return same_width(rows, keys, values)


def _take(x: Float[Tensor, "B G S width"], block: QueryBlock, heads: int) -> Float[Tensor, "_ heads n width"]:
    """The rows of x that a block lists, for each of `heads` heads."""
    if block.run is not None:
        taken = x[:, :, block.run]
    else:
        rows, row = _rows(x, block.tokens)
        taken = rows.index_select(0, row.flatten()).view(*row.shape, x.shape[-1])
    return taken if taken.shape[1] == heads else taken.repeat_interleave(heads // taken.shape[1], dim=1)


def _take_bias(bias: Float[Tensor, "B h Nq K"], block: QueryBlock, heads: int) -> Float[Tensor, "_ heads n 1"]:
    """The bias of each listed key's block, for each of `heads` heads; of what fills up a shorter list, any."""
    tokens = block.tokens.shape[-1]
    taken = bias[:, :, block.lists, : -(-tokens // block.block_k)]
    taken = taken.transpose(1, 2).flatten(0, 1) if block.single else taken[:, :, 0]
    taken = taken.repeat_interleave(block.block_k, dim=-1)[..., :tokens, None]
    return taken if taken.shape[1] == heads else taken.repeat_interleave(heads // taken.shape[1], dim=1)


def _give_back_bias(total: Float[Tensor, "B h Nq K"], part: Float[Tensor, "_ heads n"], block: QueryBlock) -> None:
    """Write the gradients of a block's biases, each of which no other block of queries reads."""
    part = F.pad(part.unflatten(1, (total.shape[1], -1)).sum(dim=2), (0, -part.shape[-1] % block.block_k))
    part = part.unflatten(-1, (-1, block.block_k)).sum(dim=-1)
    part = part.unflatten(0, (len(total), -1)).transpose(1, 2) if block.single else part[:, :, None]
    total[:, :, block.lists, : part.shape[-1]] = part


def _give_back(total: Float[Tensor, "B G S width"], part: Float[Tensor, "_ heads n width"], block: QueryBlock) -> None:
    """Add a block's gradient to the rows it was taken from."""
    if block.run is not None:
        total[:, :, block.run] += part.unflatten(1, (total.shape[1], -1)).sum(dim=2)
        return
    rows, row = _rows(total, block.tokens)
    part = part.unflatten(1, (row.shape[1], -1)).sum(dim=2)
    rows.index_add_(0, row.flatten(), part.reshape(-1, part.shape[-1]))


def _rows(
    x: Float[Tensor, "B G S width"], tokens: Int[Tensor, "B h *C n"]
) -> tuple[Float[Tensor, "rows width"], Int[Tensor, "_ heads n"]]:
    """x as a matrix of rows, whatever its strides, without a copy, and where tokens stand in it; heads is the larger
    of h and G. Of single queries each is a sequence.

    A projection leaves heads behind positions, a cache leaves room after each head: copied into one piece for every
    block of queries, all keys would be read as often as there are blocks.
    """
    batch, groups, _, width = x.shape
    unit = math.gcd(*x.stride()[:3]) or 1
    steps = [stride // unit for stride in x.stride()[:3]]
    last = sum((size - 1) * step for size, step in zip(x.shape[:3], steps, strict=True))
    heads = max(groups, tokens.shape[1])
    group = torch.arange(heads, device=x.device) // (heads // groups)
    first = torch.arange(batch, device=x.device)[:, None] * steps[0] + group * steps[1]
    row = (tokens * steps[2]).expand(-1, heads, *tokens.shape[2:])
    row = row + first.view(*first.shape, *[1] * (tokens.ndim - 2))
    if tokens.ndim == 4:
        row = row.transpose(1, 2).flatten(0, 1)
    return x.as_strided((last + 1, width), (unit, 1)), row


def _key_bytes(k: Tensor, v: Tensor, selection: Selection) -> int:
    """Of the gathered keys and values of a token, in all heads that do not share them, over the batch."""
    heads = max(k.shape[1], selection.indices.shape[1])
    return len(k) * heads * (k.shape[-1] + v.shape[-1]) * k.element_size()
