"""The compressed branch of NSA (arXiv 2502.11089): each token attends to the means of all blocks that it has behind it.

    out_t = sum_j softmax_j(scale * q_t . kbar_j) vbar_j        over the blocks j that end at or before t
    kbar_j, vbar_j                                              means of the keys and values of block j
    attention = g_c * out + g_s * attend(selection)             g = sigmoid(W x), for each head and each of the two

The branch is in the output, so the language loss reaches the means of keys, chosen or not: they learn to be found. NSA
pools by a learned map over overlapping blocks; here by means, as the search does. A token without a complete block
behind it gets 0.

    t + 1 = block_k * c + r,  0 <= r < block_k:     the query sees blocks 0 ... c - 1

Queries of one r are a causal sequence over blocks, with c - 1 for a position: so offsets become heads that share keys,
torch's fused kernel does the rest, and no n x n object exists, nor one of n x n / block_k. The products are quadratic
all the same, n^2 / (2 block_k) pairs: the one way to learn that is. A cache holds the means too, each written when its
last token is there, so a token that is decoded reads 1 / block_k of what dense attention does.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dsv3.attention.dense import dense


def pooled(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    v: Float[Tensor, "B G S R"],
    block: int,
    *,
    scale: float,
    held: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "B H T R"]:
    """Attention of the last T of S positions to the means of the blocks that each of them has behind it.

    held    a cache's means of keys [B,G,M,P] and of values [B,G,M,R], with room for M blocks: it has those before these
            positions, and gets those that they complete
    """
    heads, queries, total = q.shape[1], q.shape[2], k.shape[2]
    blocks, first = total // block, total - queries + 1
    if blocks == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    done = 0 if held is None else (total - queries) // block
    means = [_means(x[:, :, done * block : blocks * block], block) for x in (k, v)]
    if held is not None:
        means = [_extended(old, new.detach(), done) for old, new in zip(held, means, strict=True)]
    if queries == 1:
        return dense(q, *means, scale=scale)
    before = first % block
    rows = F.pad(q, (0, 0, before, -(before + queries) % block)).unflatten(2, (-1, block))
    blind = 1 if first < block else 0  # queries with no block behind them come first
    rows = rows[:, :, blind:].transpose(2, 3).flatten(1, 2)
    out = dense(rows, *means, scale=scale).unflatten(1, (heads, block)).transpose(2, 3).flatten(2, 3)
    return F.pad(out, (0, 0, blind * block, 0))[:, :, before : before + queries]


def joined(
    gates: Float[Tensor, "B T H2"], branch: Float[Tensor, "B H T R"], selected: Float[Tensor, "B H T R"]
) -> Float[Tensor, "B H T R"]:
    """g_c * branch + g_s * selected, the gates of the branch before those of the selection."""
    of_branch, of_selected = torch.sigmoid(gates).transpose(1, 2)[..., None].chunk(2, dim=1)
    return of_branch * branch + of_selected * selected


def _means(x: Float[Tensor, "B G n width"], block: int) -> Float[Tensor, "B G N width"]:
    return x.unflatten(2, (-1, block)).mean(dim=3)


def _extended(
    held: Float[Tensor, "B G M width"], new: Float[Tensor, "B G n width"], done: int
) -> Float[Tensor, "B G N width"]:
    """The means that are there, once the new ones are written behind the first `done`."""
    stop = done + new.shape[2]
    held[:, :, done:stop] = new
    return held[:, :, :stop]
