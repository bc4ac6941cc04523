"""How much of dense attention's weight a choice of blocks catches, on the queries and keys of a trained model.

    mass = weight on the chosen blocks / weight on all blocks that could be chosen        mean over the last queries

Forced blocks (a query's own, the previous and the first one) are seen by every arm and hold most of the weight, so they
are left out above and below; `all keys` is the same with them, where an arm that chooses nothing is not at 0. A random
choice of as many blocks is the floor, the choice by true weight of the block (`oracle`) the ceiling, neither a method.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dsv3.attention import Selection
from dsv3.attention.select import blocks, hierarchical
from dsv3.config import Blocks, Hierarchical, vary
from dsv3.model import Transformer

LAST = 1024  # queries at the end of the text that are looked at
Chosen = Bool[Tensor, "H Nq Nk"]


class _Attended(TorchFunctionMode):
    """Keeps the queries, keys and scale of every call of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, float]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], kwargs["scale"]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def attended(model: Transformer, row: Int[Tensor, " T"]) -> list[tuple[Tensor, Tensor, float]]:
    """The queries, keys [1, H, T, P] and softmax scale of every layer of a model that attends densely."""
    with _Attended() as seen:
        model.eval()(row[None])
    return seen.calls


def masses(
    q: Float[Tensor, "1 H T P"], k: Float[Tensor, "1 H T P"], choice: Blocks, *, scale: float, seed: int
) -> dict[str, tuple[float, float]]:
    """By arm, the mass among the blocks that could be chosen, and the mass of all keys, over the last queries.

    `choice` is the flat one; trees have its blocks. Lengths are multiples of the blocks, block_q equals block_k.
    """
    assert choice.block_q == choice.block_k, "a block of queries lies in one block of keys"
    size = choice.block_k
    first = max(0, q.shape[2] - LAST) // size
    weight = _weights(q, k, scale, first * size, size)
    forced, could = _forced(q.shape[2] // size, first, q.device)
    free = (weight * could).sum(dim=-1)
    counted = free > 0  # the first queries have nothing to choose from
    found = {}
    for arm, chosen in _choices(q, k, choice, weight * could, could, scale, seed, first):
        caught = (weight * (chosen & could)).sum(dim=-1)
        seen = (weight * (chosen | forced)).sum(dim=-1)
        found[arm] = ((caught / free)[counted].mean().item(), seen.mean().item())
    return found


def _weights(q: Tensor, k: Tensor, scale: float, first: int, size: int) -> Float[Tensor, "H Nq size Nk"]:
    """Softmax weights of the queries from `first` on, summed over each block of keys, head by head."""
    position = torch.arange(q.shape[2], device=q.device)
    later = position > position[first:, None]
    heads = []
    for head, key in zip(q[0, :, first:], k[0], strict=True):
        weight = (head @ key.T * scale).masked_fill_(later, float("-inf")).softmax(dim=-1)
        heads.append(weight.unflatten(1, (-1, size)).sum(dim=-1).unflatten(0, (-1, size)))
    return torch.stack(heads)


def _forced(blocks: int, first: int, device: torch.device) -> tuple[Bool[Tensor, "Nq 1 Nk"], Bool[Tensor, "Nq 1 Nk"]]:
    """Which blocks of keys each block of queries sees in any case, and which it could choose."""
    key, own = torch.arange(blocks, device=device), torch.arange(first, blocks, device=device)[:, None]
    forced = (key == 0) | (key == own) | (key == own - 1)
    return forced[:, None], ((key < own) & ~forced)[:, None]


def _choices(
    q: Tensor, k: Tensor, choice: Blocks, free: Tensor, could: Tensor, scale: float, seed: int, first: int
) -> Iterator[tuple[str, Bool[Tensor, "H Nq 1 Nk"]]]:
    tree = Hierarchical(k=choice.k, block_q=choice.block_q, block_k=choice.block_k)
    wanted: dict[str, Callable[[], Selection]] = {
        "blocks": lambda: blocks(q, k, choice, scale=scale),
        "hierarchical": lambda: hierarchical(q, k, tree, scale=scale),
        "best_first": lambda: hierarchical(q, k, vary(tree, search="best_first"), scale=scale),
    }
    for arm, make in wanted.items():
        yield arm, _named(make(), could.shape[-1])[:, first:, None]
    assert choice.k is not None, "a number of blocks is chosen"
    most = choice.k - choice.own - 2
    generator = torch.Generator().manual_seed(seed)
    yield "random", _most(torch.rand(free.shape[:2] + free.shape[3:], generator=generator), could, most)
    yield "oracle", _most(free.sum(dim=2), could, most)
    yield "forced", torch.zeros_like(could).expand(free.shape[0], -1, -1, -1)


def _named(selection: Selection, blocks: int) -> Chosen:
    """Which blocks of keys are listed."""
    listed = torch.arange(selection.indices.shape[-1]) < selection.counts[0, :, :, None]
    named = torch.zeros(*selection.counts.shape[1:], blocks + 1, dtype=torch.bool)
    return named.scatter_(-1, selection.indices[0].masked_fill(~listed, blocks), value=True)[..., :blocks]


def _most(score: Float[Tensor, "H Nq Nk"], could: Tensor, number: int) -> Bool[Tensor, "H Nq 1 Nk"]:
    """The blocks of the highest scores among those that could be chosen."""
    place = score.masked_fill(~could[:, 0], -1.0).topk(min(number, score.shape[-1]), dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, place, value=True)[:, :, None] & could
