"""What the newest block of queries chose: its first token chose for all of it, so that a decoder which goes through the
others, one by one, has nothing left to search.

The choice is kept under the number of its block. It holds until the block's first token is written anew, and that token
searches and replaces it; a decoder that continues from a length in another block finds another number there, and
searches by what the index remembers of that block's first token. So what is seen at a position never depends on the way
there. Only the blocks of keys that the block of queries lies in are joined on the way, as tokens begin them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.attention.select.listed import pairs_of_block
from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import Blocks

if TYPE_CHECKING:
    from dsv3.attention.select.index import Index


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one block of queries sees up to the key block `newest`; past: key blocks before it, over all lists."""

    block: int
    newest: int
    indices: Int[Tensor, "B h 1 K"]
    counts: Int[Tensor, "B h 1"]
    past: int


@dataclass
class Latest:
    """A place for one choice. It is replaced, not written in place as an index is: Selections share its lists."""

    choice: Choice | None = None


@torch.compiler.disable  # remembers between calls
@torch.no_grad()
def latest_or(
    search: Callable[[Blocks, "Index", int, int, float], Selection],
    choice: Blocks,
    index: "Index",
    start: int,
    total: int,
    scale: float,
) -> Selection:
    """What the positions from `start` to `total` see: as their block has chosen before, or what `search` finds."""
    place = index.latest
    if place is None or choice.block_q == 1:
        return search(choice, index, start, total, scale)
    block, latest = (total - 1) // choice.block_q, place.choice
    begun = start % choice.block_q > 0 and start // choice.block_q == block
    if begun and latest is not None and latest.block == block:
        place.choice = latest = _up_to(latest, (total - 1) // choice.block_k)
        return _of_block(choice, latest, start, total)
    found = search(choice, index, start, total, scale)
    place.choice = _of_last_row(choice, found, total)
    return found


def _of_last_row(choice: Blocks, found: Selection, total: int) -> Choice:
    block, newest = (total - 1) // choice.block_q, (total - 1) // choice.block_k
    # copies: a prompt's lists of all blocks should not stay for the sake of the last
    indices, counts = found.indices[:, :, -1:].clone(), found.counts[:, :, -1:].clone()
    complete = block * choice.block_q // choice.block_k
    past = counts.numel() * choice.past(complete)
    if choice.top_p is not None:
        past = int(counts.sum()) - counts.numel() * (newest - complete + 1)
    return Choice(block=block, newest=newest, indices=indices, counts=counts, past=past)


def _up_to(latest: Choice, newest: int) -> Choice:
    """The same choice, with the key blocks that its own tokens have begun up to `newest`, which close every list."""
    indices, counts = latest.indices, latest.counts
    for number in range(latest.newest + 1, newest + 1):
        indices = indices.scatter(-1, counts[..., None], number)
        counts = counts + 1
    if newest < latest.newest:
        counts = counts - (latest.newest - newest)
    return latest if newest == latest.newest else replace(latest, newest=newest, indices=indices, counts=counts)


def _of_block(choice: Blocks, latest: Choice, start: int, total: int) -> Selection:
    """The choice as a Selection of some of the block's tokens; nothing was scored for them."""
    kept = pairs_of_block(choice, start, total, latest.past, latest.counts.numel())
    return Selection(
        indices=latest.indices,
        counts=latest.counts,
        block_q=total - start,
        block_k=choice.block_k,
        cost=SelectionCost(scored=0, kept=kept, per_level=(0,)),
    )
