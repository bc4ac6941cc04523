"""How a choice of blocks learns, though choosing has no gradient: by the scores of the blocks that are seen, taken once
more with one.

    score(i, j)   scale * q_i . mean of the keys of block j: what the search compared, whoever shares it; q_i: the query
                  that chose for block i, and j one of its listed blocks that end before it
    gated         bias(i, j) = log(2 sigmoid(score(i, j)))        a factor in the softmax: 1 for a score of 0
    entmax        bias(i, j) = log(m p(i, j))        p(i): the 1.5-entmax of the scores of the m blocks that were found
                  (arXiv 1905.05702); those with p = 0 are no longer seen. Equal scores: a factor of 1, as above
    distilled     loss = mean_t KL(a(i) || softmax_j score(i, j))        a(i): attention's own weights, summed over the
                  keys of j, made 1 over all j, and averaged over the tokens and heads that share the list

Blocks that the queries lie in have a factor of 1; in entmax the first and the previous one too, which are seen whatever
their score. 1.5-entmax gives weight to the best scores alone, so that over the blocks found it is what it would be over
all, as long as it leaves out one of them. Attention is the teacher of `distilled` and gets no gradient; the scores'
reaches queries and keys themselves, so that keys learn to be found by their mean.

What trains in O(n log n), when blocks are found down a tree:

    nothing                     the search, and attention to k blocks: O(n log n)
    gated, entmax, distilled    k scores a block of queries besides, and the teacher k block_k products a token
                                and head once more: O(n log n)
    branch                      each token reads the means of all blocks before it, see `dsv3.attention.pooled`:
                                O(n^2 / block_k)
"""

import math
from dataclasses import dataclass, replace

import torch
from entmax import entmax15
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dsv3.attention.select.block_scores import block_scores, listed_rows
from dsv3.attention.select.distillation import divergence
from dsv3.attention.select.index import Index, shared_keys, shared_queries
from dsv3.attention.select.listed import FAR
from dsv3.attention.select.scores import chunks
from dsv3.attention.selection import Selection
from dsv3.config import Blocks


@dataclass(frozen=True)
class Compared:
    """What a search compares: the queries that choose from position `start` on, and the means of all complete blocks;
    in fp32 or wider.
    """

    leaders: Float[Tensor, "B h n W"]
    means: Float[Tensor, "B g N W"]
    start: int

    @classmethod
    def of(cls, choice: Blocks, q: Float[Tensor, "B H n P"], k: Float[Tensor, "B G T P"]) -> "Compared":
        """With gradient, of the queries that choose and of all keys."""
        kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        blocks, size = k.shape[2] // choice.block_k, choice.block_k
        whole = shared_keys(choice, k.to(kind))[:, :, : blocks * size]
        return cls(shared_queries(choice, q.to(kind), k.shape[1]), whole.unflatten(2, (blocks, size)).mean(dim=3), 0)

    @classmethod
    def remembered(cls, index: Index, start: int) -> "Compared":
        """The same numbers, read off an index of means; without gradient."""
        return cls(index.leaders, index.nodes[0], start)


@torch.compiler.disable  # loops over pieces of sizes that differ
def weighed(choice: Blocks, selection: Selection, compared: Compared, total: int, scale: float) -> Selection:
    """The selection of the positions up to `total` with the bias of a choice that is gated, or goes by entmax."""
    complete = _complete(choice, selection, compared.start, total)
    past = _listed(selection) & (selection.indices < complete)
    score = _scores(choice, selection, compared, total) * scale
    if choice.learns == "gated":
        bias = F.logsigmoid(score) + math.log(2)
        return replace(selection, bias=bias.masked_fill(~past, 0))
    free = past & (selection.indices > 0) & (selection.indices < complete - 1) & score.isfinite()
    weight = _entmax(score, free)
    least = torch.finfo(weight.dtype).tiny
    factor = weight.clamp(min=least) * free.sum(dim=-1, keepdim=True)
    bias = factor.masked_fill(~free, 1).log()
    return _without(replace(selection, bias=bias), free & (weight <= 0), compared.start, total)


@torch.compiler.disable  # a loop over pieces of sizes that differ
def taught(
    choice: Blocks,
    selection: Selection,
    compared: Compared,
    attended: tuple[Float[Tensor, "B H T P"], Float[Tensor, "B G T P"]],
    scale: float,
) -> Selection:
    """The selection of all T positions with the loss by which its scores follow attention's own `attended` weights."""
    q, k = attended
    total = k.shape[2]
    past = _listed(selection) & (selection.indices < _complete(choice, selection, 0, total))
    score = _scores(choice, selection, compared, total) * scale
    target = _mass(selection, past, q.detach().to(score.dtype), k.detach().to(score.dtype), scale)
    seen = past | ~past.any(dim=-1, keepdim=True)  # a softmax over nothing would have a gradient that is no number
    share = _sizes(selection, 0, total).to(score.dtype) / (total * selection.counts[..., 0].numel())
    return replace(selection, loss=(divergence(score, target, seen) * share[:, None]).sum())


def _complete(choice: Blocks, selection: Selection, start: int, total: int) -> Int[Tensor, "Nq 1"]:
    """Key blocks that end before the first query of each row's block of queries."""
    position = torch.arange(start, total, selection.block_q, device=selection.indices.device)
    return (position // choice.block_q * choice.block_q // choice.block_k)[:, None]


def _listed(selection: Selection) -> Bool[Tensor, "B h Nq K"]:
    place = torch.arange(selection.indices.shape[-1], device=selection.indices.device)
    return place < selection.counts[..., None]


def _sizes(selection: Selection, start: int, total: int) -> Int[Tensor, " Nq"]:
    """Queries of each row."""
    position = torch.arange(start, total, selection.block_q, device=selection.indices.device)
    return (total - position).clamp(max=selection.block_q)


def _scores(choice: Blocks, selection: Selection, compared: Compared, total: int) -> Float[Tensor, "B h Nq K"]:
    """q . mean of the listed blocks; of those that are not complete, any."""
    start = compared.start
    position = torch.arange(start, total, selection.block_q, device=selection.indices.device)
    leaders = compared.leaders.index_select(2, position // choice.block_q - start // choice.block_q)
    return block_scores(leaders, compared.means, selection.indices)


def _entmax(score: Float[Tensor, "B h Nq K"], free: Bool[Tensor, "B h Nq K"]) -> Float[Tensor, "B h Nq K"]:
    """1.5-entmax over the free ones of each row; of a row without any, numbers that nobody reads."""
    nothing = torch.where(free.any(dim=-1, keepdim=True), float("-inf"), 0.0).to(score.dtype)
    return entmax15(torch.where(free, score, nothing), dim=-1)


def _without(selection: Selection, dropped: Bool[Tensor, "B h Nq K"], start: int, total: int) -> Selection:
    """The selection without some of its listed blocks, all of them past."""
    assert selection.bias is not None, "blocks are dropped for their weight"
    gone = dropped | ~_listed(selection)
    indices, place = selection.indices.masked_fill(gone, FAR).sort(dim=-1, stable=True)
    pairs = int((dropped.sum(dim=(0, 1, 3)) * _sizes(selection, start, total)).sum()) * selection.block_k
    return replace(
        selection,
        indices=indices.masked_fill(indices == FAR, 0),
        counts=selection.counts - dropped.sum(dim=-1),
        bias=selection.bias.gather(-1, place),
        cost=replace(selection.cost, kept=selection.cost.kept - pairs),
    )


@torch.no_grad()
def _mass(
    selection: Selection, past: Bool[Tensor, "B h Nq K"], q: Tensor, k: Tensor, scale: float
) -> Float[Tensor, "B h Nq K"]:
    """Attention's weights of the past blocks of each list, made 1 over them; 0 in a row without any."""
    (heads, rows, most), size = selection.indices.shape[1:], selection.block_k
    groups, blocks = k.shape[1], k.shape[2] // size
    if blocks == 0:
        return q.new_zeros(selection.indices.shape)
    each = max(heads, groups)
    indices, past = (x.repeat_interleave(each // heads, dim=1) for x in (selection.indices, past))
    place = listed_rows(indices, groups, blocks)
    keys = k[:, :, : blocks * size].unflatten(2, (blocks, size)).reshape(-1, size, k.shape[-1])
    queries = F.pad(q, (0, 0, 0, rows * selection.block_q - q.shape[2])).unflatten(2, (rows, -1))
    queries = queries.unflatten(1, (each, -1)).transpose(2, 3).flatten(3, 4)  # [B, each, Nq, heads * tokens, P]
    counted = (torch.arange(selection.block_q, device=q.device) < _sizes(selection, 0, q.shape[2])[:, None]).to(q.dtype)
    parts = []
    for part in chunks(rows, len(q) * each * most * size * (q.shape[-1] + queries.shape[3])):
        gathered = keys[place[:, :, part]].flatten(3, 4)
        logit = (queries[:, :, part] @ gathered.mT) * scale
        seen = past[:, :, part, None].repeat_interleave(size, dim=-1)
        weight = logit.masked_fill(~seen, torch.finfo(logit.dtype).min).softmax(dim=-1).mul_(seen)
        mass = weight.unflatten(-1, (most, size)).sum(dim=-1).unflatten(3, (-1, selection.block_q))
        mass = torch.einsum("bensck,nc->bensk", mass, counted[part]) / counted[part].sum(dim=1)[:, None, None]
        parts.append(mass.mean(dim=3).unflatten(1, (heads, -1)).mean(dim=2))
    return torch.cat(parts, dim=2)
