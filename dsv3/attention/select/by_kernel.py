"""The searches of `blocks` and `hierarchical` in one call of the C++ kernel, each on its own.

What it finds is what those two define: the same walks, the same forced blocks, the same ties. Scores are summed in an
order of their own, as every matrix product has one, so lists may differ where two scores are equal but for rounding.
No search waits for a longer one beside it, as in tensors, and a token alone, as in decoding, costs one call where torch
takes some fifty. Left to the searches in tensors are top_p, whatever the kernel cannot compute, and flat searches over
wide nodes, as latent attention has: side by side they are one large product.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.attention.kernels import blocks as kernel
from dsv3.attention.select.index import Index, bounds
from dsv3.attention.select.listed import complete_blocks, kept_pairs, of_lists
from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import Blocks, Hierarchical
from dsv3.config.counts import scored_in_all

WIDEST = 256  # numbers of a node up to which scores one by one take less time than a product of all


def by_kernel(choice: Blocks, index: Index, start: int, total: int) -> Selection | None:
    """What the positions from `start` to `total` see, where the kernel can search for them and any search has to leave
    key blocks out; otherwise None.
    """
    complete = (total - 1) // choice.block_q * choice.block_q // choice.block_k
    leaves_out = 2 < choice.past(complete) < complete
    if choice.top_p is not None or not leaves_out or _one_product(choice, index) or not _computable(index):
        return None
    indices, counts, opened, computed = kernel.block_choice(
        index.leaders,
        index.nodes,
        _searches(choice, start, total),
        own=choice.own,
        newest=(total - 1) // choice.block_k,
        longest=choice.longest(complete),
        branching=choice.branching if isinstance(choice, Hierarchical) else 0,
        bounds=bounds(choice),
    )
    lists = index.leaders.shape[:2].numel()
    per_level = [lists * number for number in scored_in_all(choice, start, total)]
    if bounds(choice):
        # the index may have more levels than these positions reach
        per_level = [sum(both) for both in zip(per_level, opened.tolist(), strict=False)]
    while len(per_level) > 1 and per_level[-1] == 0:
        per_level.pop()
    kept = kept_pairs(choice, lists, start, total)
    cost = SelectionCost(scored=sum(per_level), kept=kept, per_level=tuple(per_level), computed=computed)
    return of_lists(choice, indices, counts, start, total, cost)


def _searches(choice: Blocks, start: int, total: int) -> Int[Tensor, "Nq 3"]:
    """Of each search: complete key blocks, how many are seen besides the first and the previous one, and the beam."""
    first, last = (t // choice.block_q * choice.block_q // choice.block_k for t in (start, total - 1))
    numbers = torch.tensor(
        [
            (c, choice.past(c) - min(c, 2), choice.beam(c) if isinstance(choice, Hierarchical) else 1)
            for c in range(first, last + 1)
        ]
    )
    if start // choice.block_q == (total - 1) // choice.block_q:
        return numbers
    return numbers[complete_blocks(choice, start, total) - first]


def _one_product(choice: Blocks, index: Index) -> bool:
    blocks, width = index.leaders.shape[2:]
    return not isinstance(choice, Hierarchical) and blocks > 1 and width > WIDEST


def _computable(index: Index) -> bool:
    """Whether the kernel takes what the index holds; the first time this may compile it."""
    leaders = index.leaders
    return leaders.device.type == "cpu" and leaders.dtype == torch.float32 and kernel.why_not() is None
