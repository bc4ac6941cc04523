"""Per-head top-k: each head keeps the visible tokens that a linear map of x scores highest. The article's dynamic sparse attention, repaired.

    importance = W x   one score per token and head            query t keeps the k_t most important of tokens 0..t
    logit(t, j) = scale * q_t . k_j + importance_j   over the kept j        k_t = max(1, floor(keep * (t + 1)))   or   min(k, t + 1)

What the article prints cannot run, and would leak if it did. Repaired here:
- its last product multiplies [batch, seq, heads] with [batch, seq, dim]: attention by q.k over the kept keys takes its place;
- its softmax runs over heads: here over the kept keys of each head;
- its k and its top-k are taken over the whole sequence, so a token's output depends on later tokens: here over the tokens visible to each query, so decoding
  with a cache keeps what a full forward kept.
The printed form multiplies by the softmax of the scores, which is how its map learns; here importance is added to the logits, so that the map has a gradient
through every key it kept. Keys it dropped give none. A bias in the map would shift all logits of a head alike, so there is none. Ties go to the earlier token.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.attention.select.order import kth_of_prefixes
from dsv3.attention.select.window import clipped_sum
from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import PerHead

BLOCK_Q = 256


class Importance(nn.Module):
    """The linear map from a token to its importance for each head."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden, heads, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """One score per token and head."""
        return self.proj(x)


def kept_tokens(visible: Int[Tensor, "n"], *, keep: float | None = None, k: int | None = None) -> Int[Tensor, "n"]:
    """How many tokens a query keeps of the `visible` ones: max(1, floor(keep * visible)), product in float64, or min(k, visible)."""
    if k is not None:
        return visible.clamp(max=k)
    assert keep is not None, "either a share or a number of tokens is kept"
    return (visible.double() * keep).floor().long().clamp(min=1)


def per_head(
    importance: Float[Tensor, "B H S"],
    queries: int,
    *,
    keep: float | None = None,
    k: int | None = None,
    block_q: int = BLOCK_Q,
) -> Selection:
    """Top-k by importance for the last `queries` of S positions, each head on its own.

    A block of queries lists the best tokens before it, as many as its last query keeps, then its own tokens; the token-exact rule cuts to each
    query's own k. Both are decided by tokens the queries may see.

    Raises:
        ValueError: unless exactly one of keep (in (0, 1]) and k (at least 1) is given.
    """
    PerHead(keep=keep, k=k)
    total = importance.shape[-1]
    order = importance.detach().argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(total, device=order.device)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    visible = place[total - queries :] + 1
    kept = kept_tokens(visible, keep=keep, k=k)
    indices, counts = _candidates(rank, kept, queries, block_q, fixed=k is not None)
    return Selection(
        indices=indices,
        counts=counts,
        block_q=block_q,
        block_k=1,
        cost=_cost(importance.shape, queries, kept, k),
        rank=rank,
        limit=kth_of_prefixes(rank, visible, kept - 1),
        weights=importance,
    )


def _candidates(
    rank: Int[Tensor, "B H S"], kept: Int[Tensor, "T"], queries: int, block_q: int, *, fixed: bool
) -> tuple[Int[Tensor, "B H Nq K"], Int[Tensor, "B H Nq"]]:
    """Per block: the most important tokens before it, ascending by position, then its own."""
    total = rank.shape[-1]
    starts = range(total - queries, total, block_q)
    stops = [min(start + block_q, total) for start in starts]
    most = [int(kept[stop - 1 - (total - queries)]) for stop in stops]
    before = [min(count, start) for count, start in zip(most, starts, strict=True)]
    edge = kth_of_prefixes(
        rank, _like(rank, [max(start, 1) for start in starts]), _like(rank, [max(n - 1, 0) for n in before])
    )
    pool, blocks = torch.arange(total - queries, device=rank.device).expand(*rank.shape[:-1], -1), []
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        best = pool
        if before[i] < start:
            good = rank.gather(-1, pool) <= edge[..., i, None]
            best = pool.masked_select(good).view(*rank.shape[:-1], before[i])
        own = torch.arange(start, stop, device=rank.device).expand(*rank.shape[:-1], -1)
        blocks.append(torch.cat((best, own), dim=-1))
        # with a fixed number kept, a token that drops out of the best never returns
        pool = torch.cat((best if fixed else pool, own), dim=-1)
    widest = max((block.shape[-1] for block in blocks), default=0)
    padded = [nn.functional.pad(block, (0, widest - block.shape[-1]), value=total - 1) for block in blocks]
    counts = _like(rank, [block.shape[-1] for block in blocks])
    return torch.stack(padded, dim=2), counts.expand(*rank.shape[:-1], -1)


def _like(rank: Tensor, numbers: list[int]) -> Int[Tensor, "n"]:
    return torch.tensor(numbers, dtype=torch.int64, device=rank.device)


def _cost(shape: torch.Size, queries: int, kept: Int[Tensor, "T"], k: int | None) -> SelectionCost:
    """One score per new token and head; kept is an arithmetic sum for a fixed k, the sum of k_t for a share."""
    batch, heads, total = shape
    per_row = int(kept.sum()) if k is None else clipped_sum(total - queries + 1, total, k)
    return SelectionCost(scored=batch * heads * queries, kept=batch * heads * per_row)
