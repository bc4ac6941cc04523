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
from dsv3.attention.select.counts import scored_in_all
from dsv3.attention.select.documents import by_document
from dsv3.attention.select.index import Index, query_vectors
from dsv3.attention.select.listed import FAR, complete_blocks, of_complete, selection
from dsv3.attention.select.tree import Walks, beam_leaves, leaves_above
from dsv3.attention.selection import Selection
from dsv3.config import Blocks, Hierarchical

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
        ValueError: when the first query is not the first of its block, or a document begins inside a block.
    """
    return by_document(search, q, k, choice, scale=scale, documents=documents)


@torch.compiler.disable  # integers, and loops whose sizes differ: nothing to fuse
@torch.no_grad()
def search(choice: Blocks, index: Index, start: int, total: int, scale: float) -> Selection:
    """The same for the positions from `start` to `total`, from what an index remembers: their leaders and all nodes."""
    assert isinstance(choice, Hierarchical), "the flat choice has a search of its own"
    complete = complete_blocks(choice, start, total)
    batch, heads, _, width = index.leaders.shape
    each = max(1, ROWS // (batch * heads))
    scored, parts = [0] * len(index.nodes), []
    for i in range(0, len(complete), each):
        rows = slice(i, i + each)
        query = query_vectors(choice, index.leaders[:, :, rows].permute(2, 0, 1, 3).reshape(-1, width))
        found, looked_at = _leaves(choice, _walks(choice, index, query, complete[rows]), index.nodes, scale)
        parts.append(found.unflatten(0, (-1, batch, heads)).permute(1, 2, 0, 3))
        for level, number in enumerate(looked_at):
            scored[level] += number
    most = max(part.shape[-1] for part in parts)
    chosen = torch.cat([F.pad(part, (0, most - part.shape[-1]), value=FAR) for part in parts], dim=2)
    for level, number in enumerate(scored_in_all(choice, start, total)):
        scored[level] += batch * heads * number
    while len(scored) > 1 and scored[-1] == 0:
        scored.pop()
    return selection(choice, chosen, start, total, tuple(scored))


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
    choice: Hierarchical, walks: Walks, levels: tuple[Tensor, ...], scale: float
) -> tuple[Int[Tensor, "r m"], list[int]]:
    """The leaves that each walk finds (FAR: none), and how many nodes it scored whose number no closed form tells."""
    if int(walks.free.max()) == 0:
        return torch.full((len(walks.query), 0), FAR, device=walks.query.device), []
    nodes, found, counted = beam_leaves(walks, levels, ordered=choice.top_p is not None)
    looked_at: list[int] = []
    if choice.search == "best_first":
        threshold = found.masked_fill(~counted, float("inf")).amin(dim=1) - _rounding(walks, levels)
        threshold = threshold.masked_fill(counted.sum(dim=1) < walks.free, float("-inf"))
        nodes, found, looked_at = leaves_above(walks, levels, threshold)
        place, counted = best(found, walks.free, ordered=choice.top_p is not None)
        nodes, found = nodes.gather(1, place), found.gather(1, place)
    if choice.top_p is not None:
        counted = fewest(found * scale, counted, choice.top_p)
    return nodes.masked_fill(~counted, FAR), looked_at


def _rounding(walks: Walks, levels: tuple[Tensor, ...]) -> Float[Tensor, " r"]:
    """More than a bound can fall below that of a descendant by rounding alone."""
    largest = levels[0].abs().amax() * walks.query.abs().sum(dim=1)
    return largest * walks.query.shape[1] * torch.finfo(walks.query.dtype).eps
