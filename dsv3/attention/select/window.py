"""Sliding window: a query sees the last `size` tokens, its own among them, and the first `sink` tokens of the sequence.

The window is that of Longformer and Mistral (arXiv 2004.05150, 2310.06825); the sink keeps the first tokens, on which
trained softmax attention rests weight it has no use for (arXiv 2309.17453). Nothing is scored; the query at position t
keeps min(t + 1, size + sink) keys, so cost is linear in T.
"""

import torch

from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config.rules import require

BLOCK_Q = 64
BLOCK_K = 64


@torch.compiler.disable  # integers per block: nothing to fuse
def window(
    batch: int,
    queries: int,
    total: int,
    *,
    size: int,
    sink: int = 0,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    device: torch.device | str = "cpu",
) -> Selection:
    """The window's selection for the last `queries` of `total` positions, shared by all heads.

    Raises:
        ValueError: for a size or a block below 1, a negative sink, or no query.
    """
    require(1 <= queries <= total, "queries", queries, f"must be between 1 and total={total}", "select for some tokens")
    require(size >= 1, "size", size, "must be at least 1: a token sees itself", "use a larger window")
    require(sink >= 0, "sink", sink, "must not be negative", "use 0 for no sink")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        require(block >= 1, name, block, "must be at least 1: a block holds a token", "use longer blocks")
    block_q = min(block_q, queries)
    first = torch.arange(total - queries, total, block_q, device=device)
    low = (first - size + 1).clamp(min=0) // block_k
    high = ((first + block_q).clamp(max=total) - 1) // block_k + 1
    sunk = low.clamp(max=-(-sink // block_k))
    counts = sunk + high - low
    slot = torch.arange(int(counts.max()), device=device)
    indices = torch.where(slot < sunk[:, None], slot, low[:, None] + slot - sunk[:, None])
    position = torch.arange(total, device=device)
    rank = torch.where(position < sink, -total, -position)
    limit = size - 1 - position[total - queries :]
    return Selection(
        indices=indices.expand(batch, 1, -1, -1),
        counts=counts.expand(batch, 1, -1),
        block_q=block_q,
        block_k=block_k,
        cost=SelectionCost(scored=0, kept=batch * clipped_sum(total - queries + 1, total, size + sink)),
        rank=rank.expand(batch, 1, -1),
        limit=limit.expand(batch, 1, -1),
    )


def clipped_sum(first: int, last: int, most: int) -> int:
    """min(first, most) + ... + min(last, most): keys kept where a query sees at most `most` of those up to its own."""

    def up_to(n: int) -> int:
        ramp = min(n, most)
        return ramp * (ramp + 1) // 2 + (n - ramp) * most

    return up_to(last) - up_to(first - 1)
