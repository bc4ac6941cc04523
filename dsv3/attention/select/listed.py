"""From chosen blocks to a Selection: the forced blocks join, and blocks of queries fall on the queries at hand.

A block of queries is counted from position 0, whatever queries are at hand, so that a prompt read in pieces and a token
decoded alone choose as a whole forward does. Where the first query lies inside a block, rows of the Selection are cut
finer: every row still repeats its block's choice.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import Blocks

FAR = 2**40  # stands for no block; times a branching it still fits


def complete_blocks(choice: Blocks, start: int, total: int) -> Int[Tensor, " Nq"]:
    """For each block of queries that holds a position from `start` to `total`: key blocks that end before its first
    token. On the host.
    """
    blocks = torch.arange(start // choice.block_q, (total - 1) // choice.block_q + 1)
    return blocks * choice.block_q // choice.block_k


def of_complete(rule: Callable[[int], int], complete: Int[Tensor, " Nq"]) -> Int[Tensor, " Nq"]:
    """A rule on the number of complete key blocks, such as `Blocks.past`, for ascending numbers of them."""
    low = int(complete[0])
    return torch.tensor([rule(c) for c in range(low, int(complete[-1]) + 1)])[complete - low]


def unscored(choice: Blocks, complete: Int[Tensor, " Nq"], heads: torch.Size, device: torch.device) -> Tensor:
    """What the first blocks of queries choose, those that need no score, [*heads, n, m]: all that may be chosen, or
    nothing beside the forced blocks. From the n-th block on scores decide.
    """
    past = of_complete(choice.past, complete)
    decided = (past > 2) & ((complete > past) | (choice.top_p is not None))
    first = int((decided.cumsum(0) == 0).sum())
    most = (complete - 2).where(complete == past, torch.tensor(0))[:first, None]
    number = torch.arange(1, 1 + max(0, int(most.max())) if first else 1)
    return torch.where(number <= most, number, FAR).to(device).expand(*heads, -1, -1)


def joined(parts: list[Tensor]) -> Int[Tensor, "B h Nq m"]:
    """Rows of what was chosen, of any lengths, below each other (FAR: none)."""
    most = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, most - part.shape[-1]), value=FAR) for part in parts], dim=2)


def selection(
    choice: Blocks,
    chosen: Int[Tensor, "B h Nq m"],
    start: int,
    total: int,
    per_level: tuple[int, ...],
    computed: int,
) -> Selection:
    """The forced blocks and the chosen ones (FAR: none), for the queries at positions `start` to `total`."""
    device = chosen.device
    complete = complete_blocks(choice, start, total).to(device)
    own = complete[:, None] + torch.arange(choice.own, device=device)
    forced = torch.stack((torch.where(complete > 0, 0, FAR), torch.where(complete > 1, complete - 1, FAR)), dim=1)
    forced = torch.cat((forced, own.masked_fill(own > (total - 1) // choice.block_k, FAR)), dim=1)
    indices = torch.cat((chosen, forced.expand(*chosen.shape[:2], -1, -1)), dim=-1).sort(dim=-1).values
    indices = indices[..., : choice.longest(int(complete[-1]))]
    counts = (indices < FAR).sum(dim=-1)
    if choice.top_p is None:
        kept = kept_pairs(choice, chosen.shape[:2].numel(), start, total)
    else:
        kept = _pairs(choice, start, total, (chosen < FAR).sum(dim=(0, 1, 3)).cpu(), chosen.shape[:2].numel())
    cost = SelectionCost(scored=sum(per_level), kept=kept, per_level=per_level, computed=computed)
    return of_lists(choice, indices.masked_fill(indices == FAR, 0), counts, start, total, cost)


def of_lists(
    choice: Blocks,
    indices: Int[Tensor, "B h Nq K"],
    counts: Int[Tensor, "B h Nq"],
    start: int,
    total: int,
    cost: SelectionCost,
) -> Selection:
    """The lists of blocks of queries as those of the queries at positions `start` to `total`."""
    block, size = _rows(choice, start, total)
    return Selection(
        indices=indices[:, :, block], counts=counts[:, :, block], block_q=size, block_k=choice.block_k, cost=cost
    )


def _rows(choice: Blocks, start: int, total: int) -> tuple[Int[Tensor, " rows"] | slice, int]:
    """Which block each row of the Selection repeats, and the tokens in a row."""
    first, last = start // choice.block_q, (total - 1) // choice.block_q
    if start % choice.block_q == 0:
        return slice(None), choice.block_q
    if first == last:
        return slice(None), total - start
    size = math.gcd(start, choice.block_q)
    return torch.arange(start, total, size) // choice.block_q - first, size


def pairs_of_block(choice: Blocks, start: int, total: int, past: int, lists: int) -> int:
    """Pairs of a query from `start` to `total`, which lie in one block of queries, and a key up to its own, over all
    lists together: they name `past` key blocks before the block of queries.
    """
    complete = start // choice.block_q * choice.block_q // choice.block_k
    own = (total - start) * (start + total + 1) // 2 - (total - start) * complete * choice.block_k
    return (total - start) * past * choice.block_k + lists * own


def kept_pairs(choice: Blocks, lists: int, start: int, total: int) -> int:
    """Pairs of a query from `start` to `total` and a key up to its own in the listed blocks, over so many lists of each
    block of queries; without top_p.
    """
    first, last = start // choice.block_q, (total - 1) // choice.block_q
    if first == last:
        past = choice.past(first * choice.block_q // choice.block_k)
        return pairs_of_block(choice, start, total, lists * past, lists)
    complete = complete_blocks(choice, start, total)
    free = of_complete(choice.past, complete) - complete.clamp(max=2)
    return _pairs(choice, start, total, lists * free, lists)


def _pairs(choice: Blocks, start: int, total: int, chosen: Int[Tensor, " Nq"], lists: int) -> int:
    """The same, where the lists of a block of queries together name so many blocks besides the forced ones."""
    position = torch.arange(start, total)
    block = position // choice.block_q
    complete = block * choice.block_q // choice.block_k
    inside = int((position - complete * choice.block_k + 1).sum()) * lists
    past = chosen[block - block[0]] + complete.clamp(max=2) * lists
    return inside + int(past.sum()) * choice.block_k
