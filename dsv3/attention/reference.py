"""Attention by its definition, query by query, in float64: slow, made to be read, and what the fast forms must equal.

    out(b, h, t) = sum_j p_j v(b, g, j)      over the keys j in seen(b, h, t), with g = h // (H/G)
    p = softmax_j(scale * q(b, h, t) . k(b, g, j) + w(b, h, j) + bias(b, h, t, j))

Which keys are seen is a function of sequence, head and position: `everything`, `window` and `per_head` are such, by
counting and sorting plain numbers, and `selected` reads one off a Selection, as `selected_bias` does with a bias.
`pooled` attends to means of blocks. `latent` is multi-head latent attention by its equations. Gradients come by
autograd through the same loops.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention.selection import Selection
from dsv3.config import Latent, Rope
from dsv3.layers import frequencies, softmax_mscale

Seen = Callable[[int, int, int], Sequence[int]]
Bias = Callable[[int, int, int], Tensor]  # of each key that is seen


def attention(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    v: Float[Tensor, "B G S R"],
    seen: Seen,
    *,
    scale: float,
    weights: Float[Tensor, "B H S"] | None = None,
    bias: Bias | None = None,
) -> Float[Tensor, "B H T R"]:
    """Queries are the last T of S positions; `seen(sequence, head, position)` lists the keys of one query."""
    q, k, v = q.double(), k.double(), v.double()
    (batch, heads, queries, _), (groups, total) = q.shape, k.shape[1:3]
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(queries):
                keys = list(seen(b, h, total - queries + t))
                logit = scale * (k[b, g, keys] @ q[b, h, t])
                if weights is not None:
                    logit = logit + weights[b, h, keys].double()
                if bias is not None:
                    logit = logit + bias(b, h, total - queries + t).double()
                exponent = (logit - logit.detach().max()).exp()
                rows.append(exponent @ v[b, g, keys] / exponent.sum())
    return torch.stack(rows).view(batch, heads, queries, v.shape[-1])


def everything(sequence: int, head: int, position: int) -> Sequence[int]:
    """All keys up to the query's own."""
    return range(position + 1)


def window(size: int, sink: int = 0) -> Seen:
    """The last `size` keys and the first `sink` ones."""

    def seen(sequence: int, head: int, position: int) -> Sequence[int]:
        return [key for key in range(position + 1) if key > position - size or key < sink]

    return seen


def per_head(importance: Float[Tensor, "B H S"], *, keep: float | None = None, k: int | None = None) -> Seen:
    """The most important of the visible keys, earlier ones first among equals."""
    scores = importance.detach().tolist()

    def seen(sequence: int, head: int, position: int) -> Sequence[int]:
        visible = position + 1
        if keep is None:
            assert k is not None, "either a share or a number of tokens is kept"
            most = min(k, visible)
        else:
            most = max(1, math.floor(keep * visible))
        score = scores[sequence][head]
        return sorted(sorted(range(visible), key=lambda key: (-score[key], key))[:most])

    return seen


def selected(selection: Selection, *, heads: int, queries: int, total: int) -> Seen:
    """What a selection lets the last `queries` of `total` positions see in each of `heads` heads, by its definition."""
    indices, counts = selection.indices.tolist(), selection.counts.tolist()
    rank = None if selection.rank is None else selection.rank.tolist()
    limit = [] if selection.limit is None else selection.limit.tolist()
    share = heads // selection.indices.shape[1]

    def seen(sequence: int, head: int, position: int) -> Sequence[int]:
        h, row = head // share, position - (total - queries)
        block = row // selection.block_q
        listed = set(indices[sequence][h][block][: counts[sequence][h][block]])
        keys = [key for key in range(position + 1) if key // selection.block_k in listed]
        return keys if rank is None else [key for key in keys if rank[sequence][h][key] <= limit[sequence][h][row]]

    return seen


def selected_bias(selection: Selection, *, heads: int, queries: int, total: int) -> Bias:
    """What a selection adds to the logits of the keys that `selected` lists, in their order."""
    assert selection.bias is not None, "this selection has no bias"
    given, share = selection.bias, heads // selection.indices.shape[1]
    indices, seen = selection.indices.tolist(), selected(selection, heads=heads, queries=queries, total=total)

    def bias(sequence: int, head: int, position: int) -> Tensor:
        h, block = head // share, (position - (total - queries)) // selection.block_q
        listed = indices[sequence][h][block]
        places = [listed.index(key // selection.block_k) for key in seen(sequence, head, position)]
        return given[sequence, h, block, places]

    return bias


def pooled(
    q: Float[Tensor, "B H T P"], k: Float[Tensor, "B G T P"], v: Float[Tensor, "B G T R"], block: int, *, scale: float
) -> Float[Tensor, "B H T R"]:
    """Attention to the means of the blocks of keys that end at or before each query; 0 where none does."""
    out = []
    for b, h, t in itertools.product(*(range(n) for n in q.shape[:3])):
        g = h // (q.shape[1] // k.shape[1])
        ended = [slice(j * block, (j + 1) * block) for j in range((t + 1) // block)]
        if not ended:
            out.append(v.new_zeros(v.shape[-1]))
            continue
        logit = torch.stack([scale * q[b, h, t] @ k[b, g, keys].mean(dim=0) for keys in ended])
        out.append(logit.softmax(0) @ torch.stack([v[b, g, keys].mean(dim=0) for keys in ended]))
    return torch.stack(out).view(*q.shape[:3], v.shape[-1])


def rotate(x: Float[Tensor, " P"], position: int, frequency: Float[Tensor, " half"]) -> Float[Tensor, " P"]:
    """Turn each pair (x[2i], x[2i+1]) by the angle position * frequency[i]."""
    turned = []
    for i, turn in enumerate(frequency.double().tolist()):
        cos, sin = math.cos(position * turn), math.sin(position * turn)
        turned += [x[2 * i] * cos - x[2 * i + 1] * sin, x[2 * i] * sin + x[2 * i + 1] * cos]
    return torch.stack(turned)


def latent(
    x: Float[Tensor, "B T D"], weights: Mapping[str, Tensor], shape: Latent, rope: Rope, seen: Seen
) -> Float[Tensor, "B T D"]:
    """MLA of a whole sequence; `weights` are a LatentAttention's parameters by name, in float64.

    With `importance.proj.weight` among them, importance is added to the logits. YaRN's mscale and mscale_all_dim must
    be equal.
    """
    heads, nope, value = shape.num_attention_heads, shape.qk_nope_head_dim, shape.v_head_dim
    up = weights["kv_b_proj.weight"].view(heads, nope + value, shape.kv_lora_rank)
    q, k, v = [], [], []
    for query, turned, c, shared in _latent_tokens(x, weights, shape, rope):
        q.append([torch.cat((query[h], turned[h])) for h in range(heads)])
        k.append([torch.cat((up[h, :nope] @ c, shared)) for h in range(heads)])
        v.append([up[h, nope:] @ c for h in range(heads)])
    scale = shape.qk_head_dim**-0.5 * softmax_mscale(rope)
    added = weights.get("importance.proj.weight")
    importance = None if added is None else (x.double() @ added.T).transpose(1, 2)
    batch = x.shape[0]
    out = attention(_stack(q, batch), _stack(k, batch), _stack(v, batch), seen, scale=scale, weights=importance)
    return out.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T


def latent_space(
    x: Float[Tensor, "B T D"], weights: Mapping[str, Tensor], shape: Latent, rope: Rope, *, rotated: bool = True
) -> tuple[Float[Tensor, "B H T W"], Float[Tensor, "B 1 T W"]]:
    """Queries and the one key per token whose products are MLA's logits; not rotated, without their rotary part."""
    heads, nope, value = shape.num_attention_heads, shape.qk_nope_head_dim, shape.v_head_dim
    up = weights["kv_b_proj.weight"].view(heads, nope + value, shape.kv_lora_rank)
    q, k = [], []
    for query, turned, c, shared in _latent_tokens(x, weights, shape, rope):
        moved = [up[h, :nope].T @ query[h] for h in range(heads)]
        q.append([torch.cat((moved[h], turned[h])) if rotated else moved[h] for h in range(heads)])
        k.append([torch.cat((c, shared)) if rotated else c])
    return _stack(q, x.shape[0]), _stack(k, x.shape[0])


def _latent_tokens(
    x: Tensor, weights: Mapping[str, Tensor], shape: Latent, rope: Rope
) -> Iterator[tuple[Tensor, list[Tensor], Tensor, Tensor]]:
    """Per token: each head's query without position, its rotated part, the latent and the rotated key."""
    heads, nope, rank = shape.num_attention_heads, shape.qk_nope_head_dim, shape.kv_lora_rank
    frequency = frequencies(shape.qk_rope_head_dim, rope)
    for i, token in enumerate(x.double().flatten(0, 1)):
        position = i % x.shape[1]
        compressed = weights["kv_a_proj_with_mqa.weight"] @ token
        c = _normal(compressed[:rank], weights["kv_a_layernorm.weight"])
        query = _query(token, weights, shape)
        turned = [rotate(query[h, nope:], position, frequency) for h in range(heads)]
        yield query[:, :nope], turned, c, rotate(compressed[rank:], position, frequency)


def _query(token: Tensor, weights: Mapping[str, Tensor], shape: Latent) -> Float[Tensor, "H P"]:
    if shape.q_lora_rank is None:
        flat = weights["q_proj.weight"] @ token
    else:
        low = _normal(weights["q_a_proj.weight"] @ token, weights["q_a_layernorm.weight"])
        flat = weights["q_b_proj.weight"] @ low
    return flat.view(shape.num_attention_heads, shape.qk_head_dim)


def _normal(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean() + 1e-6).sqrt()


def _stack(tokens: list[list[Tensor]], batch: int) -> Float[Tensor, "B H T P"]:
    rows = torch.stack([torch.stack(heads) for heads in tokens])
    return rows.unflatten(0, (batch, -1)).transpose(1, 2)
