"""Block top-k found by walking down a tree over key blocks, so that choosing costs O(n log n) for a fixed k.

    leaves: key blocks of block_k tokens; b nodes of a level make one of the next; a query lies behind c complete leaves
    open := the nodes of some level, none left out; then, level by level downwards:
        candidates := children of the open nodes that end before the query      scored by the query of the block
        open := the w best of them, and the node that the query lies in         on the leaves: the best, as in `blocks`

Only nodes wholly in the past are scored; the one that straddles the query is opened by force, so no summary per prefix
is needed and no later token has a say. Which query chooses, forced blocks and granularity are those of `blocks`; with a
beam as wide as there are blocks the result is the same.

    beam        score = query . mean key of the node. Looks at about w b log_b(c / w) nodes: `counts` has the exact
                number. Inexact: a good block under a dull ancestor is missed.
    best_first  score = sum_d max(q_d max_d, q_d min_d), the upper bound of q.k over a node's keys (Quest, arXiv
                2406.10774), never below that of its children. Finds exactly the leaves of the largest bound: a beam
                gives a threshold, the score of its worst leaf; then every node that reaches the threshold is opened.
                Those are the nodes that a search by priority opens too, taken level by level instead of one by one so
                that it runs on tensors. Worst case: all nodes, linear per query; `cost.per_level` counts what was
                scored, the beam's included.

Where there is a C++ kernel it walks one search after the other (`by_kernel`). In tensors searches run side by side,
padded to rows of one length: `cost.computed` counts what that adds.

Trees over keys for attention: HiP (arXiv 2406.09827) and LLSA's pyramid, neither both causal and trained. ZETA (arXiv
2501.14577) sorts keys along a curve, log-linear attention (arXiv 2506.04761) gives every query a fixed hierarchy. top_p
cuts among the best leaves, never on the way down, so it changes no count. Ties go to the earlier block.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dsv3.attention.select.best import best, fewest
from dsv3.attention.select.by_kernel import by_kernel
from dsv3.attention.select.documents import by_document
from dsv3.attention.select.index import Index, query_vectors
from dsv3.attention.select.listed import FAR, complete_blocks, joined, of_complete, selection, unscored
from dsv3.attention.select.tree import Walks, beam_leaves, leaves_above
from dsv3.attention.selection import Selection
from dsv3.config import Blocks, Hierarchical
from dsv3.config.counts import scored_in_all

ROWS = 1024  # searches run side by side, so that a step costs more than its call


def hierarchical(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    choice: Hierarchical,
    *,
    scale: float | None = None,
    documents: Sequence[int] = (0,),
) -> Selection:
    """Which key blocks the queries at the last T of S positions see; `scale` of the softmax counts for top_p alone.

    `documents`: where packed documents begin; each has a tree of its own.

    Raises:
        ValueError: for shapes that do not fit each other, when the first query is not the first of its block, or a
            document begins inside a block.
    """
    return by_document(search, q, k, choice, scale=scale, documents=documents)


@torch.compiler.disable  # integers, and loops whose sizes differ: nothing to fuse
@torch.no_grad()
def search(choice: Blocks, index: Index, start: int, total: int, scale: float) -> Selection:
    """The same for the positions from `start` to `total`, from what an index remembers: their leaders and all nodes."""
    assert isinstance(choice, Hierarchical), "the flat choice has a search of its own"
    if (found := by_kernel(choice, index, start, total)) is not None:
        return found
    complete = complete_blocks(choice, start, total)
    batch, heads, _, width = index.leaders.shape
    each = max(1, ROWS // (batch * heads))
    scored, computed = [0] * len(index.nodes), 0
    parts = [unscored(choice, complete, index.leaders.shape[:2], index.leaders.device)]
    for i in range(parts[0].shape[2], len(complete), each):
        rows = slice(i, i + each)
        query = query_vectors(choice, index.leaders[:, :, rows].permute(2, 0, 1, 3).reshape(-1, width))
        leaves, looked_at, products = _leaves(choice, _walks(choice, index, query, complete[rows]), index, scale)
        parts.append(leaves.unflatten(0, (-1, batch, heads)).permute(1, 2, 0, 3))
        computed += products
        for level, number in enumerate(looked_at):
            scored[level] += number
    for level, number in enumerate(scored_in_all(choice, start, total)):
        scored[level] += batch * heads * number
    while len(scored) > 1 and scored[-1] == 0:
        scored.pop()
    return selection(choice, joined(parts), start, total, tuple(scored), computed)


def _walks(choice: Hierarchical, index: Index, query: Tensor, complete: Tensor) -> Walks:
    """The searches of some blocks of queries in all sequences and heads, a row each, position by position."""
    device, (batch, groups), heads = query.device, index.nodes[0].shape[:2], index.leaders.shape[1]
    tree = torch.arange(batch * heads, device=device) // (heads // groups)

    def spread(number: Tensor) -> Int[Tensor, " r"]:
        return number.to(device).repeat_interleave(batch * heads)

    return Walks(
        query=query,
        tree=tree.repeat(len(complete)),
        complete=spread(complete),
        beam=spread(of_complete(choice.beam, complete)),
        free=spread(of_complete(choice.past, complete) - complete.clamp(max=2)),
        branching=choice.branching,
        heads=heads,
        longest=int(complete[-1]),
    )


def _leaves(
    choice: Hierarchical, walks: Walks, index: Index, scale: float
) -> tuple[Int[Tensor, "r m"], list[int], int]:
    """The leaves that each walk finds (FAR: none), how many nodes it scored whose number no closed form tells, by
    level, and how many scores were computed in all.
    """
    nodes, found, counted, computed = beam_leaves(walks, index.nodes, ordered=choice.top_p is not None)
    looked_at: list[int] = []
    if index.largest is not None:
        worst = found.masked_fill(~counted, float("inf"))
        threshold = F.pad(worst, (0, 1), value=float("inf")).amin(dim=1) - _rounding(walks, index.largest)
        threshold = threshold.masked_fill(counted.sum(dim=1) < walks.free, float("-inf"))
        nodes, found, looked_at = leaves_above(walks, index.nodes, threshold)
        computed += sum(looked_at)
        place, counted = best(found, walks.free, ordered=choice.top_p is not None)
        nodes, found = nodes.gather(1, place), found.gather(1, place)
    if choice.top_p is not None:
        counted = fewest(found * scale, counted, choice.top_p)
    return nodes.masked_fill(~counted, FAR), looked_at, computed


def _rounding(walks: Walks, largest: Float[Tensor, "B g n"]) -> Float[Tensor, " r"]:
    """More than a bound can fall by rounding alone below that of a descendant and a threshold summed in another order.

    A sum of W products errs by at most W eps / 2 times the sum of their sizes; four sums stand between a threshold and
    a bound. O(1) for a walk: the index knows how large the numbers of all leaves before it are.
    """
    largest = largest.flatten(0, 1)[walks.tree, walks.complete - 1]
    return 2 * largest * walks.query.abs().sum(dim=1) * walks.query.shape[1] * torch.finfo(walks.query.dtype).eps
