"""Per-head top-k: each head keeps the visible tokens that a linear map of x scores highest.

This is the article's dynamic sparse attention, repaired:

    importance = W x             one score per token and head
    k_t = max(1, floor(keep * (t + 1)))   or   min(k, t + 1)
    logit(t, j) = scale * q_t . k_j + importance_j      over the k_t most important j of the tokens 0..t

What the article prints cannot run, and would leak if it did. Repaired here:
- its last product multiplies [batch, seq, heads] with [batch, seq, dim]; attention by q.k over the kept keys stands in;
- its softmax runs over heads; here over the kept keys of each head;
- its k and its top-k take in the whole sequence, so that a token's output depends on later ones; here both count the
  tokens visible to each query, and decoding with a cache keeps what a full forward kept.

The printed form multiplies by the softmax of the scores, which is how its map learns. Here the importance is added to
the logits, which keeps that gradient: through every kept key, none through a dropped one. A bias in the map would move
all logits of a head alike, so there is none. Ties go to the earlier token.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.attention import shapes
from dsv3.attention.select.order import kth_of_prefixes
from dsv3.attention.select.window import clipped_sum
from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import PerHead
from dsv3.config.rules import require

BLOCK_Q = 256


class Importance(nn.Module):
    """The linear map from a token to its importance for each head."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden, heads, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """One score per token and head."""
        return self.proj(x)


def kept_tokens(visible: Int[Tensor, " n"], *, keep: float | None = None, k: int | None = None) -> Int[Tensor, " n"]:
    """How many of its `visible` tokens a query keeps; the product with a share is taken in float64."""
    if k is not None:
        return visible.clamp(max=k)
    assert keep is not None, "either a share or a number of tokens is kept"
    return (visible.double() * keep).floor().long().clamp(min=1)


@torch.compiler.disable  # a loop over blocks of sizes that differ: nothing to fuse, minutes to compile
def per_head(
    importance: Float[Tensor, "B H S"],
    queries: int,
    *,
    keep: float | None = None,
    k: int | None = None,
    block_q: int = BLOCK_Q,
) -> Selection:
    """Top-k by importance for the last `queries` of S positions, each head on its own.

    A block of queries lists the best tokens before it, as many as its last query keeps, then its own tokens; the
    token-exact rule cuts to each query's own k. Both are decided by tokens the queries may see.

    Raises:
        ValueError: unless exactly one of keep (in (0, 1]) and k (at least 1) is given, for another shape, for no query,
            or for a block below 1.
    """
    PerHead(keep=keep, k=k)
    shapes.check_axes("importance", importance, "batch", "heads", "positions")
    total = importance.shape[-1]
    require(1 <= queries <= total, "queries", queries, f"must be between 1 and S={total}", "select for some tokens")
    require(block_q >= 1, "block_q", block_q, "must be at least 1: a block holds a token", "use longer blocks")
    order = importance.detach().argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(total, device=order.device)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    visible = torch.arange(total - queries + 1, total + 1)  # on the host: lengths alone decide how many are kept
    kept = kept_tokens(visible, keep=keep, k=k)
    indices, counts = _candidates(rank, kept, block_q, fixed=k is not None)
    per_row = int(kept.sum()) if k is None else clipped_sum(total - queries + 1, total, k)
    rows = importance.shape[0] * importance.shape[1]
    return Selection(
        indices=indices,
        counts=counts,
        block_q=block_q,
        block_k=1,
        cost=SelectionCost(scored=rows * queries, kept=rows * per_row, computed=rows * queries),
        rank=rank,
        limit=kth_of_prefixes(rank, visible.to(rank.device), kept.to(rank.device) - 1),
        weights=importance,
    )


def _candidates(
    rank: Int[Tensor, "B H S"], kept: Int[Tensor, " T"], block_q: int, *, fixed: bool
) -> tuple[Int[Tensor, "B H Nq K"], Int[Tensor, "B H Nq"]]:
    """Per block: the most important tokens before it, ascending by position, then its own."""
    total, before = rank.shape[-1], rank.shape[-1] - len(kept)
    starts = list(range(before, total, block_q))
    stops = [min(start + block_q, total) for start in starts]
    best = [min(int(kept[stop - 1 - before]), start) for start, stop in zip(starts, stops, strict=True)]
    edge = _worst_of_best(rank, starts, best)
    sizes = [count + stop - start for count, start, stop in zip(best, starts, stops, strict=True)]
    indices = rank.new_zeros(*rank.shape[:-1], len(starts), max(sizes))
    pool = torch.arange(before, device=rank.device).expand(*rank.shape[:-1], -1)
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        chosen = pool
        if best[i] < start:
            chosen = pool.masked_select(rank.gather(-1, pool) <= edge[..., i, None]).view(*rank.shape[:-1], best[i])
        own = torch.arange(start, stop, device=rank.device).expand(*rank.shape[:-1], -1)
        indices[..., i, : best[i]], indices[..., i, best[i] : sizes[i]] = chosen, own
        # with a fixed number kept, a token that drops out of the best never returns
        pool = torch.cat((chosen if fixed else pool, own), dim=-1)
    return indices, torch.tensor(sizes, device=rank.device).expand(*rank.shape[:-1], -1)


def _worst_of_best(rank: Int[Tensor, "B H S"], starts: list[int], best: list[int]) -> Int[Tensor, "B H Nq"]:
    """The rank of the best[i]-th most important of the tokens before starts[i]; without such tokens, any rank."""
    lengths = torch.tensor(starts, device=rank.device).clamp(min=1)
    places = torch.tensor(best, device=rank.device).clamp(min=1) - 1
    return kth_of_prefixes(rank, lengths, places)
