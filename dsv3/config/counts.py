"""How many scores choosing by content takes, in closed form: what is counted, never what is fitted.

A query behind c complete key blocks has c_l = floor(c / b^l) complete nodes before it on level l. Its search keeps w
nodes per level (the beam) and opens by force the node that it lies in, so on level l it looks at

    b * min(w, c_(l+1)) + c_l mod b  =  c_l,                     where c_(l+1) <= w: nothing was left out above
                                     =  b * w + c_l mod b,       otherwise

nodes, and scores them only where it must leave some out: where c_l > w on inner levels; on the leaves where c_0 is
more than are seen, or top_p weighs them. Where only the forced blocks are seen nothing is scored.
With w fixed that is at most b * w + b - 1 on each of log_b(c / w) + 1 levels: O(n log n) over a sequence. The flat
search looks at c - 2 blocks, all but the forced ones: O(n^2). The C++ kernel computes no other scores for a
beam; in tensors searches run side by side, padded to rows of one length (`SelectionCost.computed`). No torch: counts
need no tensor.

A choice that learns takes the scores of the blocks that it sees once more, past(c) of them; one with a branch reads the
floor((t + 1) / block_k) blocks that end at or before each token.
"""

from collections import Counter
from collections.abc import Iterable

from dsv3.config.attention import Blocks, Hierarchical


def scored(choice: Blocks, complete: int) -> tuple[int, ...]:
    """Scores computed by one query (or block of queries) behind `complete` key blocks, by level from the leaves.

    For best-first search these are the scores of the beam that finds its first threshold; what it opens afterwards
    depends on the data and is counted while searching.
    """
    past = choice.past(complete)
    leaves = past > 2 and (complete > past or choice.top_p is not None)
    if not leaves:
        return (0,)
    if not isinstance(choice, Hierarchical):
        return (complete - 2,)
    branching, beam = choice.branching, choice.beam(complete)
    levels: list[int] = []
    here = complete
    while here:
        above = here // branching
        looked_at = branching * min(beam, above) + here % branching
        levels.append(looked_at if here > beam or not levels else 0)
        here = above
    return tuple(levels)


def scored_in_all(choice: Blocks, start: int, total: int) -> tuple[int, ...]:
    """The same over the blocks of queries that hold the positions from `start` to `total`, for one head."""
    sums: Counter[int] = Counter()
    for complete, blocks in repeats(choice, start, total):
        for level, number in enumerate(scored(choice, complete)):
            sums[level] += blocks * number
    return tuple(sums[level] for level in range(max(sums, default=-1) + 1))


def learnt_in_all(choice: Blocks, total: int) -> int:
    """Scores that have a gradient, over the blocks of queries of `total` positions, for a head; with top_p, at most."""
    return sum(blocks * choice.past(complete) for complete, blocks in repeats(choice, 0, total)) if choice.scores else 0


def past_pairs(choice: Blocks, total: int) -> int:
    """Pairs of one of `total` queries and a key of the blocks that it sees and that end before its block of queries,
    for one head; with top_p, at most.
    """
    complete = (t // choice.block_q * choice.block_q // choice.block_k for t in range(total))
    return sum(choice.past(c) * choice.block_k for c in complete)


def branch_pairs(choice: Blocks, start: int, total: int) -> int:
    """Pairs of a query from `start` to `total` and a block that ends at or before it, for one head."""
    return sum((t + 1) // choice.block_k for t in range(start, total)) if choice.learns == "branch" else 0


def repeats(choice: Blocks, start: int, total: int) -> Iterable[tuple[int, int]]:
    """Numbers of complete key blocks, and how many blocks of queries between `start` and `total` have them before
    them.
    """
    first, last = start // choice.block_q, (total - 1) // choice.block_q
    each = max(1, choice.block_k // choice.block_q)
    for group in range(first // each, last // each + 1):
        blocks = min(last, group * each + each - 1) - max(first, group * each) + 1
        yield group * each * choice.block_q // choice.block_k, blocks
