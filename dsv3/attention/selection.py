"""Selection: which keys a query sees, as a value that every selector returns and `attend` consumes.

Queries and keys are cut into blocks of `block_q` and `block_k` tokens. For each block of queries a selection lists
blocks of keys; a token-exact rule may refine the list. The query at position t sees the key at position j iff

    j's block is listed for t's block   and   j <= t   and   rank[j] <= limit[t]   (where rank and limit are given)

Ranks say "the keys in order of preference": a window prefers the latest, per-head top-k the most important. Since a
comparison with a limit is all that is asked of them, ranks may be counted over the whole sequence without letting later
tokens decide what an earlier query sees.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dsv3.config.rules import require


@dataclass(frozen=True)
class SelectionCost:
    """What selecting cost and left over, over batch and the selection's heads; in closed form unless said otherwise.

    scored: scores needed to select. kept: (query, key) pairs that remain to attend to; dense causal attention keeps
    T(T+1)/2 per head. per_level: the scores by level of a tree, from the leaves, where a selector has levels.
    computed: scores that were computed, read off the search: in tensors searches run side by side as rows of one
    length, and what fills up the shorter ones is computed too; the C++ kernel computes what is needed alone.
    """

    scored: int
    kept: int
    per_level: tuple[int, ...] = ()
    computed: int = 0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The keys seen by the last T of S positions; h is 1 (shared by all heads), G (per key-value head) or H (per query
    head).

    indices  blocks of keys per block of queries; counts says how many of the K are valid. Selectors list them ascending
        and once; order, repeats and blocks of the future change nothing.
    rank, limit  the token-exact rule, both or neither.
    weights  added to the logits of a key: the importance that selected it, so that selecting has a gradient.
    bias  added to the logits of all keys of a listed block, query by query: what the block's score makes of it.
    loss  of a selector that learns by a loss of its own, while it trains; attention does not read it.
    """

    indices: Int[Tensor, "B h Nq K"]
    counts: Int[Tensor, "B h Nq"]
    block_q: int
    block_k: int
    cost: SelectionCost
    rank: Int[Tensor, "B h S"] | None = None
    limit: Int[Tensor, "B h T"] | None = None
    weights: Float[Tensor, "B h S"] | None = None
    bias: Float[Tensor, "B h Nq K"] | None = None
    loss: Float[Tensor, ""] | None = None

    def __post_init__(self) -> None:
        assert (self.rank is None) == (self.limit is None), "rank and limit are one rule: give both or neither"
        assert min(self.block_q, self.block_k) > 0, "a block holds at least one token"


def union(selection: Selection, groups: int, total: int, *, rows: int = 1) -> Int[Tensor, "B G n"]:
    """How many of `total` keys each of `groups` key-value heads hands out to `rows` listed blocks of queries at a time,
    whatever query head of the group asks: whole listed blocks, each once.

    No kernel that takes so many queries together reads less; decoding is one row. A token-exact rule may see fewer.
    """
    blocks, heads = -(-total // selection.block_k), selection.indices.shape[1]
    listed = torch.arange(selection.indices.shape[-1], device=selection.indices.device) < selection.counts[..., None]
    named = selection.indices.masked_fill(~listed, blocks).expand(-1, max(heads, groups), -1, -1)
    named = F.pad(named, (0, 0, 0, -named.shape[2] % rows), value=blocks).unflatten(2, (-1, rows))
    named = named.unflatten(1, (groups, -1)).movedim(3, 2).flatten(3).sort(dim=-1).values
    first = F.pad(named[..., 1:] != named[..., :-1], (1, 0), value=True)
    return (first * (total - named * selection.block_k).clamp(0, selection.block_k)).sum(dim=-1)


def tidy(selection: Selection, queries: int, total: int) -> Selection:
    """The same selection for the last `queries` of `total` positions, its lists ascending, without repeats and blocks
    that all queries of the block come before. Costs a comparison where they are so already. Of a repeated block the
    first bias counts.

    Raises:
        ValueError: for counts or blocks that cannot be.
    """
    indices, counts, bias = selection.indices, selection.counts, selection.bias
    if indices.shape[-1] == 0:
        indices = F.pad(indices, (0, 1))
        bias = None if bias is None else F.pad(bias, (0, 1))
    most, blocks = selection.indices.shape[-1], -(-total // selection.block_k)
    unlisted = torch.arange(indices.shape[-1], device=indices.device) >= counts[..., None]
    ends = torch.arange(total - queries, total, selection.block_q, device=indices.device) + selection.block_q
    newest = (ends.clamp(max=total) - 1) // selection.block_k
    last = indices.gather(-1, (counts[..., None] - 1).clamp(0, max(0, most - 1)).long())[..., 0]
    inside = ((indices[..., 0] >= 0) & (last <= newest)) | (counts == 0)
    rising = (indices[..., 1:] > indices[..., :-1]) | unlisted[..., 1:]
    counted = (counts >= 0) & (counts <= most)
    fits, is_tidy = torch.stack((counted.all(), inside.all() & rising.all())).tolist()  # the host waits once
    if not fits:
        given = (int(counts.min()), int(counts.max()))
        require(False, "selection.counts", given, f"must be between 0 and K={most}", "count the listed blocks")
    if is_tidy:
        return replace(selection, indices=indices, bias=bias)
    low, high = (int(x) for x in indices.masked_fill(unlisted, 0).aminmax())
    rule = f"must be between 0 and {blocks - 1}, the last of the blocks of keys"
    require(low >= 0 and high < blocks, "selection.indices", (low, high), rule, "list blocks that exist")
    indices, place = indices.masked_fill(unlisted | (indices > newest[:, None]), blocks).sort(dim=-1, stable=True)
    indices[..., 1:].masked_fill_(indices[..., 1:] == indices[..., :-1], blocks)
    indices, again = indices.sort(dim=-1)
    if bias is not None:
        bias = bias.gather(-1, place.gather(-1, again))
    return replace(selection, indices=indices, counts=(indices < blocks).sum(dim=-1), bias=bias)
