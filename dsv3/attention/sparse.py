"""Attention over selected keys in plain PyTorch: a loop over blocks of queries, each with the keys its selection lists.

    for each block of queries:   gather the listed keys and values (a run of neighbours is sliced instead)
                                 penalty = 0 where j <= t and rank[j] <= limit[t], else far below
                                 softmax(scale * q k^T + weight + penalty) v, torch's fused kernel on the small block
    a query that sees no key:    0, and no gradient; its softmax, over penalties alone, lies far below any other

The weight of a key rides along as one more column of k against a one in q: the fused kernel has a gradient for k, none
for a matrix that is added. Backward adds each block's part into gradients allocated once, so memory beyond inputs and
outputs is one block's, and no T x S matrix exists. What is in a block, in which order, and its penalty are decided by
tokens that its queries may see, so nothing later moves a bit of an output.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsv3.attention import fused
from dsv3.attention.dense import same_width
from dsv3.attention.selection import Selection, tidy
from dsv3.config.rules import require

UNSEEN = 2.0**100  # finite: a kernel's tile in which a query sees nothing yields no NaN; a power of two: exact products
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
    """Attention of the last T of S positions to the selected keys; gradients reach q, k, v and the weights.

    Raises:
        ValueError: for positions or ranks that fp32 cannot count, or lists that name blocks which do not exist.
    """
    rule = f"must be at most {LONGEST}: ranks are compared in fp32"
    require(k.shape[2] <= LONGEST, "positions", k.shape[2], rule, "attend to a shorter sequence")
    selection = _countable(tidy(selection, q.shape[2], k.shape[2]))
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    weights = None if selection.weights is None else selection.weights.to(q.dtype)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))  # rows in one piece each, to be gathered
    return _Sparse.apply(q, k, v, weights, replace(selection, weights=None), scale)


def pairs(q: Float[Tensor, "B H T P"], selection: Selection, total: int) -> int:
    """How many pairs of a query and a key the selection lets through, over batch and query heads; looks at each."""
    selection = _countable(tidy(selection, q.shape[2], total))
    penalties = (block.penalty for block in _blocks(selection, q, total))
    return sum(int((penalty == 0).sum()) * (q.shape[1] // penalty.shape[1]) for penalty in penalties)


@dataclass(frozen=True)
class _Block:
    """One block of queries and the keys listed for it: the same run for all heads, or tokens per head."""

    rows: slice
    run: slice | None
    tokens: Int[Tensor, "B h n"]
    penalty: Float[Tensor, "B heads C n"]


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, selection: Selection, scale: float
    ) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        for block in _blocks(selection, q, k.shape[2]):
            found, logs = fused.forward(*_operands(q, k, v, weights, block, scale), block.penalty, scale)
            out[:, :, block.rows] = found[..., : v.shape[-1]]
            # where a kernel keeps it to itself, the best penalty takes its place: as far below where nothing is seen
            lse[:, :, block.rows] = block.penalty.amax(dim=-1) if logs is None else logs
        out.masked_fill_(_sees_nothing(lse), 0)
        ctx.save_for_backward(q, k, v, weights, out, lse, *(getattr(selection, name) for name in TENSORS))
        ctx.plain, ctx.scale = {name: getattr(selection, name) for name in ("block_q", "block_k", "cost")}, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, out, lse, *tensors = ctx.saved_tensors
        selection = Selection(**ctx.plain, **dict(zip(TENSORS, tensors, strict=True)))
        # not zeros_like: a transposed input would pass its strides on, and rows must lie one after the other
        grad_q, grad_k, grad_v = torch.empty_like(q), k.new_zeros(k.shape), v.new_zeros(v.shape)
        blind = _sees_nothing(lse)
        if bool(blind.any()):
            grad, grad_q = grad.masked_fill(blind, 0), torch.zeros_like(q)
        grad_w = None if weights is None else weights.new_zeros(weights.shape)
        for block in _blocks(selection, q, k.shape[2]):
            operands = _operands(q, k, v, weights, block, ctx.scale)
            pad = (0, operands[0].shape[-1] - out.shape[-1])
            rows, done = (F.pad(x[:, :, block.rows], pad) for x in (grad, out))
            part_q, part_k, part_v = fused.backward(
                rows, *operands, block.penalty, ctx.scale, done, lse[:, :, block.rows]
            )
            grad_q[:, :, block.rows] = part_q[..., : q.shape[-1]]
            _give_back(grad_k, part_k[..., : k.shape[-1]], block)
            _give_back(grad_v, part_v[..., : v.shape[-1]], block)
            if grad_w is not None:
                _give_back(grad_w[..., None], part_k[..., k.shape[-1], None] / ctx.scale, block)
        return grad_q, grad_k, grad_v, grad_w, None, None


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
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, block: _Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's queries, keys and values, all with H heads and one width; the weight is a column behind the key."""
    rows, heads = q[:, :, block.rows], q.shape[1]
    keys, values = _take(k, block, heads), _take(v, block, heads)
    if weights is not None:
        added = _take(weights[..., None], block, heads)
        keys = torch.cat((keys, added / scale), dim=-1)
        rows = F.pad(rows, (0, 1), value=1.0)
    return same_width(rows, keys, values)


def _blocks(selection: Selection, q: Tensor, total: int) -> Iterator[_Block]:
    """The blocks of queries that list a key, each with its keys and its penalty, which is good until the next block."""
    queries, heads = q.shape[2], selection.counts.shape[:2]
    position = torch.arange(total - queries, total, device=q.device)
    inside = torch.arange(selection.block_k, device=q.device)
    longest = selection.counts.amax(dim=(0, 1)).tolist()
    # one buffer for all penalties: fresh memory for every block would cost more than filling it
    most = heads.numel() * min(selection.block_q, queries) * max(longest) * selection.block_k
    room = q.new_empty(most, dtype=torch.promote_types(q.dtype, torch.float32))
    for i, run in enumerate(_runs(selection, total)):
        if longest[i] == 0:
            continue
        rows = slice(i * selection.block_q, min((i + 1) * selection.block_q, queries))
        if run is None:
            blocks = selection.indices[:, :, i, : longest[i]]
            listed = torch.arange(longest[i], device=q.device) < selection.counts[:, :, i, None]
            blocks = blocks.masked_fill(~listed, total)  # past the end, so that no query sees it
            tokens = (blocks[..., None] * selection.block_k + inside).flatten(-2)
        else:
            tokens = torch.arange(run.start, run.stop, device=q.device).expand(*heads, -1)
        penalty = _penalty(selection, tokens, position[rows], rows, room)
        if 1 < heads[1] < q.shape[1]:  # per key-value head: the fused kernel takes one mask for all heads or one each
            penalty = penalty.repeat_interleave(q.shape[1] // heads[1], dim=1)
        yield _Block(rows, run, tokens.clamp(max=total - 1), penalty)


def _runs(selection: Selection, total: int) -> list[slice | None]:
    """Per block of queries: the listed tokens as one slice, if all heads and sequences list the same neighbours."""
    first = selection.indices[..., 0]
    last = selection.indices.gather(-1, (selection.counts[..., None] - 1).clamp(min=0).long()).squeeze(-1)
    alike = (last - first + 1 == selection.counts) & (first == first[:1, :1]) & (last == last[:1, :1])
    edges = zip(alike.flatten(0, 1).all(dim=0).tolist(), first[0, 0].tolist(), last[0, 0].tolist(), strict=True)
    size = selection.block_k
    return [slice(start * size, min((stop + 1) * size, total)) if run else None for run, start, stop in edges]


def _penalty(
    selection: Selection, tokens: Tensor, position: Tensor, rows: slice, room: Tensor
) -> Float[Tensor, "B h C n"]:
    """0 where the query sees the key, far below elsewhere: two passes, where a comparison and a choice take five."""
    past = (tokens <= position[0]).sum(-1).amin()
    shape = (*tokens.shape[:-1], len(position), tokens.shape[-1])
    penalty = room[: math.prod(shape)].view(shape)
    if selection.rank is not None and selection.limit is not None:
        rank = selection.rank.gather(-1, tokens.clamp(max=selection.rank.shape[-1] - 1))
        torch.sub(*_spread(rank, selection.limit[:, :, rows], room.dtype), out=penalty).clamp_(max=0)
    else:
        penalty.zero_()
    late = tokens[..., past:]
    penalty[..., past:] += torch.sub(*_spread(late, position.expand(*late.shape[:-1], -1), room.dtype)).clamp_(max=0)
    return penalty


def _spread(number: Int[Tensor, "B h n"], most: Int[Tensor, "B h C"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors whose difference [B, h, C, n] is 0 or above where number <= most, else at most -UNSEEN."""
    return most.to(dtype)[..., None] * UNSEEN, number.to(dtype)[..., None, :] * UNSEEN


def _take(x: Float[Tensor, "B G S width"], block: _Block, heads: int) -> Float[Tensor, "B H n width"]:
    """The rows of x that a block lists, for each of `heads` query heads."""
    if block.run is not None:
        taken = x[:, :, block.run]
    else:
        rows, row = _rows(x, block.tokens)
        taken = rows.index_select(0, row.flatten()).view(*row.shape, x.shape[-1])
    return taken if taken.shape[1] == heads else taken.repeat_interleave(heads // taken.shape[1], dim=1)


def _give_back(total: Float[Tensor, "B G S width"], part: Float[Tensor, "B H n width"], block: _Block) -> None:
    """Add a block's gradient to the rows it was taken from."""
    if block.run is not None:
        total[:, :, block.run] += part.unflatten(1, (total.shape[1], -1)).sum(dim=2)
        return
    rows, row = _rows(total, block.tokens)
    part = part.unflatten(1, (row.shape[1], -1)).sum(dim=2)
    rows.index_add_(0, row.flatten(), part.reshape(-1, part.shape[-1]))


def _rows(
    x: Float[Tensor, "B G S width"], tokens: Int[Tensor, "B h n"]
) -> tuple[Float[Tensor, "rows width"], Int[Tensor, "B heads n"]]:
    """x as a matrix of rows, whatever its strides, without a copy, and where tokens stand in it; heads is the larger
    of h and G.

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
    row = first[..., None] + (tokens * steps[2]).expand(-1, heads, -1)
    return x.as_strided((last + 1, width), (unit, 1)), row
