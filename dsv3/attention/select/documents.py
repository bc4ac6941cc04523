"""Packed documents: each is searched by itself, with blocks and a tree of its own, so that none sees another.

Blocks of a Selection lie on multiples of their size, so documents have to begin on such: the packing pads to them. All
sequences of a batch share the borders.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dsv3.attention import shapes
from dsv3.attention.select.index import Index, leading
from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import Blocks
from dsv3.config.rules import require

Search = Callable[[Blocks, Index, int, int, float], Selection]


def by_document(
    search: Search,
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    choice: Blocks,
    *,
    scale: float | None,
    documents: Sequence[int],
) -> Selection:
    """`search` in each document of the last T of S positions; more than one document needs all queries.

    Raises:
        ValueError: for shapes that do not fit each other, when the first query is not the first of its block, or a
            document begins inside a block.
    """
    shapes.check(q, k)
    total, start = k.shape[2], k.shape[2] - q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rule = f"must be a multiple of block_q={choice.block_q}: the first token of a block chooses for it"
    require(start % choice.block_q == 0, "S - T", start, rule, "pass the queries from a block's beginning on")
    starts = list(documents)
    if starts == [0]:
        return _one(search, q, k, choice, start, scale)
    _check(starts, choice, start, total)
    parts = [
        _one(search, q[:, :, low:high], k[:, :, low:high], choice, 0, scale) for low, high in pairwise([*starts, total])
    ]
    return _joined(parts, starts)


def _one(search: Search, q: Tensor, k: Tensor, choice: Blocks, start: int, scale: float) -> Selection:
    total, size = k.shape[2], (q.shape[0], q.shape[1], k.shape[1], q.shape[3])
    room = Index.empty(choice, size, total, torch.promote_types(q.dtype, k.dtype), q.device)
    index = room.extend(choice, q[:, :, leading(choice, start)], k, 0, total, first=start)
    return search(choice, index, start, total, scale)


def _check(starts: list[int], choice: Blocks, start: int, total: int) -> None:
    rule = f"must begin with 0, ascend and end below S={total}"
    rising = all(low < high for low, high in pairwise([*starts, total]))
    require(bool(starts) and starts[0] == 0 and rising, "documents", starts, rule, "pass where each document begins")
    size = max(choice.block_q, choice.block_k)
    aligned = all(at % size == 0 for at in starts)
    require(aligned, "documents", starts, f"must be multiples of {size}, the larger block", "pad documents to it")
    rule = "must be 0 with more than one document"
    require(start == 0, "S - T", start, rule, "select for a document being continued by itself")


def _joined(parts: list[Selection], starts: list[int]) -> Selection:
    most = max(part.indices.shape[-1] for part in parts)
    size = parts[0].block_k
    indices = [
        F.pad(part.indices + at // size, (0, most - part.indices.shape[-1]))
        for part, at in zip(parts, starts, strict=True)
    ]
    levels = max(len(part.cost.per_level) for part in parts)
    per_level = tuple(
        sum(part.cost.per_level[level] for part in parts if level < len(part.cost.per_level)) for level in range(levels)
    )
    kept, computed = sum(part.cost.kept for part in parts), sum(part.cost.computed for part in parts)
    return Selection(
        indices=torch.cat(indices, dim=2),
        counts=torch.cat([part.counts for part in parts], dim=2),
        block_q=parts[0].block_q,
        block_k=size,
        cost=SelectionCost(scored=sum(per_level), kept=kept, per_level=per_level, computed=computed),
    )
