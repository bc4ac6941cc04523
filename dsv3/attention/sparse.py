"""Attention over selected keys in plain PyTorch: a loop over blocks of queries, each with the keys its selection lists.

    for each block of queries:   gather the listed keys and values (a run of neighbours is sliced instead)
                                 mask exactly: j <= t and rank[j] <= limit[t]
                                 logits + weights, softmax, times values: torch's fused kernel on the small block

The weight of a key rides along as one more column of k against a one in q, so the fused kernel, which takes no gradient through a mask, gives weights
their gradient. Backward recomputes each block and adds into gradients allocated once, so memory beyond inputs and outputs is one block's, and no T x S
matrix exists. A selection fixes what is in a block, and its mask, from the tokens before; nothing later moves a bit of an output.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsv3.attention.dense import same_width
from dsv3.attention.selection import Selection


def sparse(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    v: Float[Tensor, "B G S R"],
    selection: Selection,
    *,
    scale: float,
) -> Float[Tensor, "B H T R"]:
    """Attention of the last T of S positions to the keys that `selection` lets them see; gradients reach q, k, v and the weights."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    weights, rule = selection.weights, replace(selection, weights=None)
    if weights is not None:
        weights = weights.to(q.dtype)
    return _Sparse.apply(q, k, v, weights, rule, scale)


@dataclass(frozen=True)
class _Block:
    """One block of queries and the keys listed for it: either a run [first, stop) or tokens per head."""

    rows: slice
    run: slice | None
    tokens: Int[Tensor, "B h n"]
    visible: Bool[Tensor, "B h C n"]


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, selection: Selection, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, weights)
        ctx.selection, ctx.scale = selection, scale
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for block in _blocks(selection, q.shape[2], k.shape[2]):
            keys, values, added = (_take(x, block) for x in (k, v, _column(weights)))
            out[:, :, block.rows] = _attend_block(q[:, :, block.rows], keys, values, added, block.visible, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        sources = (k, v, _column(weights))
        grad_q, sums = torch.empty_like(q), [None if x is None else torch.zeros_like(x) for x in sources]
        for block in _blocks(ctx.selection, q.shape[2], k.shape[2]):
            parts = [q[:, :, block.rows], *(_take(x, block) for x in sources)]
            leaves = [None if part is None else part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                out = _attend_block(*leaves, block.visible, ctx.scale)
            given = [leaf for leaf in leaves if leaf is not None]
            found = list(torch.autograd.grad(out, given, grad[:, :, block.rows]))
            grad_q[:, :, block.rows] = found[0]
            for total, part in zip(sums, found[1:], strict=False):
                _give_back(total, part, block)
        grad_weights = None if sums[2] is None else sums[2].squeeze(-1)
        return grad_q, sums[0], sums[1], grad_weights, None, None


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, visible: Tensor, scale: float
) -> Float[Tensor, "B H C R"]:
    width = v.shape[-1]
    if added is not None:
        heads = max(k.shape[1], added.shape[1])
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        k = torch.cat((k, (added / scale).expand(*k.shape[:-1], 1)), dim=-1)
        q = F.pad(q, (0, 1), value=1.0)
    q, k, v = same_width(q, k, v)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=gqa)
    return out[..., :width]


def _column(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights[..., None]


def _blocks(selection: Selection, queries: int, total: int) -> Iterator[_Block]:
    """The blocks of queries in order, each with its keys and its exact mask."""
    before = total - queries
    position = torch.arange(before, total, device=selection.indices.device)
    runs, longest = _runs(selection), selection.counts.amax(dim=(0, 1)).tolist()
    inside = torch.arange(selection.block_k, device=position.device)
    for i, count in enumerate(longest):
        rows = slice(i * selection.block_q, min((i + 1) * selection.block_q, queries))
        blocks = selection.indices[:, :, i, :count]
        tokens = (blocks[..., None] * selection.block_k + inside).flatten(-2)
        run = runs[i]
        if run is None:
            listed = torch.arange(count, device=position.device) < selection.counts[:, :, i, None]
            tokens = tokens.masked_fill(~listed.repeat_interleave(selection.block_k, dim=-1), total)
        else:
            run = slice(run.start, min(run.stop, total))
            tokens = tokens[..., : run.stop - run.start]
        visible = _visible(selection, tokens, position[rows], rows)
        yield _Block(rows, run, tokens.clamp(max=total - 1), visible)


def _runs(selection: Selection) -> list[slice | None]:
    """Per block of queries: the tokens as one slice, if all heads and sequences list the same neighbouring blocks."""
    first_BhN = selection.indices[..., 0]
    last_BhN = selection.indices.gather(-1, (selection.counts - 1).clamp(min=0)[..., None].long()).squeeze(-1)
    neighbours = last_BhN - first_BhN + 1 == selection.counts
    same = (first_BhN == first_BhN[:1, :1]) & (last_BhN == last_BhN[:1, :1])
    whole = (neighbours & same).all(dim=1).all(dim=0).tolist()
    edges = zip(whole, first_BhN[0, 0].tolist(), last_BhN[0, 0].tolist(), strict=True)
    size = selection.block_k
    return [slice(first * size, (last + 1) * size) if run else None for run, first, last in edges]


def _visible(selection: Selection, tokens: Tensor, position: Tensor, rows: slice) -> Bool[Tensor, "B h C n"]:
    visible = tokens[..., None, :] <= position[:, None]
    if selection.rank is not None and selection.limit is not None:
        rank = selection.rank.gather(-1, tokens.clamp(max=selection.rank.shape[-1] - 1))
        visible &= rank[..., None, :] <= selection.limit[:, :, rows, None]
    return visible


def _take(x: Tensor | None, block: _Block) -> Tensor | None:
    """The rows of x [B, G, S, width] that a block lists: a view of a run, else a copy per head of the pattern."""
    if x is None:
        return None
    if block.run is not None:
        return x[:, :, block.run]
    flat = _flat(x, block.tokens)
    return x.reshape(-1, x.shape[-1]).index_select(0, flat.flatten()).view(*flat.shape, x.shape[-1])


def _give_back(total: Tensor | None, part: Tensor, block: _Block) -> None:
    """Add a block's gradient to the rows it was taken from."""
    assert total is not None, "a gradient comes back only for what was taken"
    if block.run is not None:
        total[:, :, block.run] += part
    else:
        total.view(-1, total.shape[-1]).index_add_(0, _flat(total, block.tokens).flatten(), part.flatten(0, 2))


def _flat(x: Tensor, tokens: Int[Tensor, "B h n"]) -> Int[Tensor, "B heads n"]:
    """Row numbers in x [B, G, S, width] seen as a matrix; heads is the larger of h and G."""
    batch, groups, length = x.shape[:3]
    heads = max(groups, tokens.shape[1])
    group = torch.arange(heads, device=x.device) // (heads // groups)
    first = (torch.arange(batch, device=x.device)[:, None] * groups + group) * length
    return first[..., None] + tokens.expand(-1, heads, -1)
