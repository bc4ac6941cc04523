"""Flat block top-k: a block of queries sees the key blocks whose mean key scores highest (MoBA, arXiv 2502.13189).

    score(i, j) = q_i . mean of the keys of block j        q_i: the query of the first token of query block i
    seen by block i:  the key blocks it lies in, the previous one, the first one, and the best by score of the blocks
                      that end before its first token, so many that there are k in all (or a share of them)

MoBA lets every token choose; a block of 64 tokens that chooses once costs 64 times less. It must not choose by the mean
of its own queries: that lets the last of its tokens decide what the first one sees, which leaks up to a block of the
future in training and cannot be repeated when decoding. The first query alone is known to all tokens of the block, and
is all that a cache has to remember. `block_q=1` is MoBA's own granularity.

Scoring costs n/block_q * n/block_k / 2 products: quadratic, with a small constant. `hierarchical` prunes them. Blocks
of queries are scored one by one in the C++ kernel, where there is one (`by_kernel`), else side by side, all against the
blocks before the last of them, which `cost.computed` counts. Ties go to the earlier block. The choice has no gradient:
see `index`. Ways to learn all the same come on top of this: see `learning`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.attention.select.best import best, fewest
from dsv3.attention.select.by_kernel import by_kernel
from dsv3.attention.select.documents import by_document
from dsv3.attention.select.index import Index
from dsv3.attention.select.listed import FAR, complete_blocks, joined, of_complete, selection, unscored
from dsv3.attention.selection import Selection
from dsv3.config import Blocks
from dsv3.config.counts import scored_in_all

CHUNK = 2**20  # scores held at once per sequence and head
PARTS = 8  # a sequence is scored in at least so many: then what the last of each part adds is an eighth at most


def blocks(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    choice: Blocks,
    *,
    scale: float | None = None,
    documents: Sequence[int] = (0,),
) -> Selection:
    """Which key blocks the queries at the last T of S positions see; `scale` of the softmax counts for top_p alone.

    `documents`: where packed documents begin; none sees another.

    Raises:
        ValueError: for shapes that do not fit each other, when the first query is not the first of its block, or a
            document begins inside a block.
    """
    return by_document(search, q, k, choice, scale=scale, documents=documents)


@torch.compiler.disable  # integers, and loops whose sizes differ: nothing to fuse
@torch.no_grad()
def search(choice: Blocks, index: Index, start: int, total: int, scale: float) -> Selection:
    """The same for the positions from `start` to `total`, from what an index remembers: their leaders and all nodes."""
    if (found := by_kernel(choice, index, start, total)) is not None:
        return found
    complete = complete_blocks(choice, start, total)
    free = of_complete(choice.past, complete) - complete.clamp(max=2)
    heads = index.leaders.shape[:2]
    parts, computed = [unscored(choice, complete, heads, index.leaders.device)], 0
    step = max(1, min(CHUNK // max(1, int(complete[-1])), len(complete) // PARTS))
    for i in range(parts[0].shape[2], len(complete), step):
        rows = slice(i, i + step)
        places, products = _best_blocks(
            choice, index.leaders[:, :, rows], index.nodes[0], complete[rows], free[rows], scale
        )
        parts.append(places)
        computed += products
    per_level = tuple(heads.numel() * number for number in scored_in_all(choice, start, total))
    return selection(choice, joined(parts), start, total, per_level, computed)


def _best_blocks(
    choice: Blocks, q: Tensor, nodes: Tensor, complete: Tensor, free: Tensor, scale: float
) -> tuple[Int[Tensor, "B h n m"], int]:
    """The best of the key blocks between the first and the previous one, and how many scores were computed."""
    batch, heads, rows, width = q.shape
    last = int(complete[-1]) - 1  # the previous block of the last row, no candidate to any
    groups = nodes.shape[1]
    seen = nodes[:, :, 1:last]
    score = q.reshape(batch, groups, -1, width) @ seen.transpose(2, 3)
    number = torch.arange(1, last, device=q.device)
    candidate = number < complete.to(q.device)[:, None] - 1
    score = score.view(batch, heads, rows, -1)
    score = torch.where(candidate & (score > float("-inf")), score, float("-inf")).flatten(0, 2)
    number = free.to(q.device).expand(batch, heads, rows).flatten()
    place, counted = best(score, number, ordered=choice.top_p is not None)
    if choice.top_p is not None:
        counted = fewest(score.gather(1, place) * scale, counted, choice.top_p)
    return torch.where(counted, place + 1, FAR).view(batch, heads, rows, -1), score.numel()
