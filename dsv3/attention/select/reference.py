"""Choosing by content as defined, in float64 with loops: what `blocks` and `hierarchical` must equal.

`content` says which keys each query sees; `walk` goes down one tree with any score, so that it also counts what a
search looks at where there is no data to score, and `by_priority` is best-first search with a queue. `index_scores` and
`indexed` are the lightning indexer, `divergence` is its loss. Choices that learn stand in `reference_learning`.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.config import Blocks, Hierarchical, Indexer, Latent, Rope
from dsv3.layers import frequencies

Score = Callable[[int, int], float]  # of a level and a node's number on it


def content(
    choice: Blocks, q: Float[Tensor, "B H S P"], k: Float[Tensor, "B G S P"], *, scale: float = 1.0
) -> Callable[[int, int, int], Sequence[int]]:
    """The keys that sequence b, head h and position t see, when q and k of all positions are compared."""
    q, k = q.detach().double(), k.detach().double()
    found: dict[tuple[int, int, int], list[int]] = {}

    def seen(sequence: int, head: int, position: int) -> Sequence[int]:
        first = position // choice.block_q * choice.block_q
        complete = first // choice.block_k
        key = (sequence, head, first)
        if key not in found:
            score = node_score(choice, compared(choice, q, k, sequence, head, first))
            found[key] = past_blocks(choice, complete, score, scale)
        past = [token for j in found[key] for token in range(j * choice.block_k, (j + 1) * choice.block_k)]
        return past + list(range(complete * choice.block_k, position + 1))

    return seen


def index_scores(
    x: Float[Tensor, "B T D"], weights: Mapping[str, Tensor], shape: Latent, rope: Rope
) -> list[list[list[float]]]:
    """How a lightning indexer scores key s for query t of sequence b: [b][t][s], s up to t.

    `weights` are a LatentAttention's parameters by name, in float64. YaRN's mscale and mscale_all_dim must be equal.
    """
    choice = shape.select
    assert isinstance(choice, Indexer), "other selectors have other scores"
    weights = {name: weight.detach() for name, weight in weights.items()}
    heads, width = choice.index_n_heads, choice.index_head_dim
    frequency = frequencies(shape.qk_rope_head_dim, rope).double().tolist()
    scores = []
    for sequence in x.detach().double():
        keys, rows = [], []
        for t, token in enumerate(sequence):
            low = weights["q_a_proj.weight"] @ token
            c_q = low / (low.square().mean() + 1e-6).sqrt() * weights["q_a_layernorm.weight"]
            queries = (weights["indexer.wq_b.weight"] @ c_q).view(heads, width)
            key = weights["indexer.wk.weight"] @ token
            key = (key - key.mean()) / (key.var(correction=0) + 1e-6).sqrt()
            key = key * weights["indexer.k_norm.weight"] + weights["indexer.k_norm.bias"]
            keys.append(_turn_halves(key, t, frequency))
            head_weight = weights["indexer.weights_proj.weight"] @ token / math.sqrt(heads) / math.sqrt(width)
            turned = [_turn_halves(query, t, frequency) for query in queries]
            asked = list(zip(head_weight, turned, strict=True))
            rows.append([float(sum(w * max(0.0, float(q @ key)) for w, q in asked)) for key in keys])
        scores.append(rows)
    return scores


def indexed(scores: list[list[list[float]]], topk: int) -> Callable[[int, int, int], Sequence[int]]:
    """The best keys of each query by these scores, earlier ones first among equals, the same in all heads."""

    def seen(sequence: int, head: int, position: int) -> Sequence[int]:
        score = scores[sequence][position]
        return sorted(sorted(range(position + 1), key=lambda s: (-score[s], s))[:topk])

    return seen


def divergence(
    scores: Float[Tensor, "B T T"],
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G T P"],
    seen: Callable[[int, int, int], Sequence[int]],
    scale: float,
) -> Float[Tensor, ""]:
    """KL of softmax(scores) from attention's weights, averaged over heads, mean over queries; over the seen keys."""
    batch, heads, length, _ = q.shape
    share, total = heads // k.shape[1], scores.new_zeros(())
    for b in range(batch):
        for t in range(length):
            keys = list(seen(b, 0, t))
            weights = [(scale * k[b, h // share, keys] @ q[b, h, t]).softmax(0) for h in range(heads)]
            p = torch.stack(weights).mean(dim=0).detach()
            total = total + (p * (p.log() - scores[b, t, keys].log_softmax(0))).sum()
    return total / (batch * length)


def _turn_halves(x: Tensor, position: int, frequency: list[float]) -> Tensor:
    """Turn the pairs (i, i + half) of the first numbers, as many as frequencies ask for."""
    turned, half = x.clone(), len(frequency)
    for i, turn in enumerate(frequency):
        cos, sin = math.cos(position * turn), math.sin(position * turn)
        turned[i], turned[i + half] = x[i] * cos - x[i + half] * sin, x[i] * sin + x[i + half] * cos
    return turned


def past_blocks(choice: Blocks, complete: int, score: Score, scale: float = 1.0) -> list[int]:
    """Which of `complete` key blocks a query sees: the first, the previous and the best."""
    forced = {0, complete - 1} & set(range(complete))
    free = choice.past(complete) - len(forced)
    if isinstance(choice, Hierarchical) and choice.search == "beam":
        candidates = set(walk(choice, complete, score)[0])
    else:
        candidates = set(range(complete))
    ordered = sorted(candidates - forced, key=lambda j: (-score(0, j), j))[:free]
    if choice.top_p is not None:
        ordered = _holding(ordered, [scale * score(0, j) for j in ordered], choice.top_p)
    return sorted(forced | set(ordered))


def walk(choice: Hierarchical, complete: int, score: Score) -> tuple[list[int], list[int]]:
    """The leaves under the best nodes of each level, and how many nodes were scored per level, leaves first."""
    branching, beam, counts = choice.branching, choice.beam(complete), []
    level = 0
    while branching ** (level + 1) <= complete:
        level += 1
    nodes = list(range(complete // branching**level))
    while level > 0:
        counts.append(len(nodes) if len(nodes) > beam else 0)
        if len(nodes) > beam:
            nodes = sorted(nodes, key=lambda j: (-score(level, j), j))[:beam]
        opened = [*nodes, complete // branching**level]
        level -= 1
        below = [child for j in opened for child in range(j * branching, (j + 1) * branching)]
        nodes = [j for j in below if j < complete // branching**level]
    past = choice.past(complete)
    if past <= 2 or (complete <= past and choice.top_p is None):
        return nodes, [0]
    return nodes, [len(nodes), *counts[::-1]]


def by_priority(choice: Hierarchical, complete: int, score: Score) -> tuple[list[int], int]:
    """The best leaves by a bound that never falls below that of a child: always open the best node at hand. Also how
    many nodes were scored.
    """
    forced = {0, complete - 1}
    free, branching, scored = choice.past(complete) - len(forced & set(range(complete))), choice.branching, 0
    level = 0
    while branching**level <= complete:
        level += 1
    queue: list[tuple[float, int, int]] = []
    straddling = [(level, 0)]
    found: list[int] = []
    while straddling or (queue and len(found) < free):
        if straddling:
            level, node = straddling.pop()
        else:
            _, level, node = heapq.heappop(queue)
        if level == 0:
            if node not in forced:
                found.append(node)
            continue
        for child in range(node * branching, (node + 1) * branching):
            if child < complete // branching ** (level - 1):
                heapq.heappush(queue, (-score(level - 1, child), level - 1, child))
                scored += 1
            elif child == complete // branching ** (level - 1) and level > 1:
                straddling.append((level - 1, child))
    return found, scored


def node_score(choice: Blocks, pairs: Sequence[tuple[Tensor, Tensor]]) -> Score:
    """The mean over pairs of a query [P] and keys [S, P] of what a node says: q . mean, or the bound of q . k."""
    return cache(partial(_of_node, choice, pairs))


def _of_node(choice: Blocks, pairs: Sequence[tuple[Tensor, Tensor]], level: int, node: int) -> float:
    span = choice.block_k * (choice.branching if isinstance(choice, Hierarchical) else 1) ** level
    keys = [(q, k[node * span : (node + 1) * span]) for q, k in pairs]
    if isinstance(choice, Hierarchical) and choice.search == "best_first":
        said = [torch.maximum(q * own.amax(dim=0), q * own.amin(dim=0)).sum() for q, own in keys]
    else:
        said = [q @ own.mean(dim=0) for q, own in keys]
    return sum(map(float, said)) / len(pairs)


def compared(choice: Blocks, q: Tensor, k: Tensor, sequence: int, head: int, position: int) -> list:
    """The queries that choose for a head at a position, each with the keys that it is compared with."""
    share, groups = q.shape[1] // k.shape[1], range(k.shape[1])
    if choice.sharing == "head":
        return [(q[sequence, head, position], k[sequence, head // share])]
    if choice.sharing == "group":
        groups = range(head // share, head // share + 1)
    return [(q[sequence, g * share : (g + 1) * share, position].mean(dim=0), k[sequence, g]) for g in groups]


def _holding(ordered: list[int], logits: list[float], mass: float) -> list[int]:
    """The first blocks that together hold `mass` of the softmax."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    kept, held = [], 0.0
    for block, weight in zip(ordered, weights, strict=True):
        if held < mass * sum(weights):
            kept.append(block)
        held += weight
    return kept
