"""The search of one block of queries alone, as in decoding: one call of the C++ kernel where torch takes some fifty.

What it finds is what `blocks` and `hierarchical` define: the same walk, the same forced blocks, the same ties. Scores
are summed in an order of their own, as every matrix product has one, so lists may differ where two scores are equal but
for rounding. Bounds and top_p are left to the searches in tensors, and so is whatever the kernel cannot compute.
"""

import torch

from dsv3.attention.kernels import blocks as kernel
from dsv3.attention.select.index import Index, bounds
from dsv3.attention.select.listed import pairs_of_block
from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import Blocks, Hierarchical
from dsv3.config.counts import scored


def alone(choice: Blocks, index: Index, start: int, total: int) -> Selection | None:
    """What the positions from `start` to `total` see, where they lie in one block of queries that the kernel can search
    for and that has to leave key blocks out; otherwise None.
    """
    block = start // choice.block_q
    complete = block * choice.block_q // choice.block_k
    levels = scored(choice, complete) if block == (total - 1) // choice.block_q else (0,)
    if levels == (0,) or choice.top_p is not None or bounds(choice) or not _computable(index):
        return None
    past = choice.past(complete)
    indices, counts, computed = kernel.block_choice(
        index.leaders,
        index.nodes,
        complete=complete,
        free=past - 2,
        beam=choice.beam(complete) if isinstance(choice, Hierarchical) else 1,
        branching=choice.branching if isinstance(choice, Hierarchical) else 0,
        own=choice.own,
        begun=(total - 1) // choice.block_k - complete + 1,
    )
    lists = counts.numel()
    while len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    per_level = tuple(lists * number for number in levels)
    kept = pairs_of_block(choice, start, total, lists * past, lists)
    return Selection(
        indices=indices,
        counts=counts,
        block_q=total - start if start % choice.block_q else choice.block_q,
        block_k=choice.block_k,
        cost=SelectionCost(scored=sum(per_level), kept=kept, per_level=per_level, computed=computed),
    )


def _computable(index: Index) -> bool:
    """Whether the kernel takes what the index holds; the first time this may compile it."""
    leaders = index.leaders
    return leaders.device.type == "cpu" and leaders.dtype == torch.float32 and kernel.why_not() is None
