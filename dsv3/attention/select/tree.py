"""Walking down trees of nodes, many searches side by side: the beam, and the opening of every node above a threshold.

A walk holds the open nodes of a level. All children of an open node are looked at, but for those that do not end before
the query; the node that the query lies in is always open. Numbers of nodes ascend along a row, so that a lower place is
an earlier node, and ties go to the earlier.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3.attention.select.best import best
from dsv3.attention.select.listed import FAR

PIECE = 2**18  # numbers of nodes gathered at once: they stay in a core's cache


@dataclass(frozen=True)
class Walks:
    """r searches: of every block of queries, in every sequence, in each of `heads` heads, in this order.

    query: what nodes are multiplied with. tree: which of the trees is searched. complete: leaves that end before the
    query, ascending, and `longest` the last of them, on the host. beam: nodes kept on inner levels. free: leaves to
    find, besides the forced ones. branching: of the trees.
    """

    query: Float[Tensor, "r W"]
    tree: Int[Tensor, " r"]
    complete: Int[Tensor, " r"]
    beam: Int[Tensor, " r"]
    free: Int[Tensor, " r"]
    branching: int
    heads: int
    longest: int

    def ending(self, level: int) -> Int[Tensor, " r"]:
        """Nodes of a level that end before the query; also the number of the node that the query lies in."""
        return self.complete // self.branching**level

    def candidates(self, nodes: Int[Tensor, "..."], before: Int[Tensor, "..."], leaf: bool) -> Bool[Tensor, "..."]:
        """Which nodes may be chosen: those that end before the query, less the forced leaves."""
        if not leaf:
            return nodes < before
        return (nodes < before - 1) & (nodes > 0)


def beam_leaves(
    walks: Walks, levels: tuple[Tensor, ...], *, ordered: bool = False
) -> tuple[Int[Tensor, "r m"], Float[Tensor, "r m"], Bool[Tensor, "r m"], int]:
    """The best leaves under the best nodes of each level, best first (equals in any order, unless `ordered`), with
    their scores, which of them count, and how many scores were computed.
    """
    level = _first_pruned(walks)
    number = torch.arange(walks.longest // walks.branching**level, device=walks.query.device)
    nodes, found = number.expand(len(walks.query), -1), every_score(walks, levels[level][:, :, : len(number)])
    computed = 0
    while True:
        computed += found.numel()
        before = walks.ending(level)[:, None]
        chosen = walks.candidates(nodes, before, level == 0)
        # a score that is no number chooses no leaf, and hides no node as long as none has to be left out
        lowest = torch.finfo(found.dtype).min if level else float("-inf")
        found = torch.where(found > float("-inf"), found, lowest).masked_fill(~chosen, float("-inf"))
        place, counted = best(found, walks.beam if level else walks.free, ordered=ordered and level == 0)
        nodes = nodes.gather(1, place)
        if level == 0:
            return nodes, found.gather(1, place), counted, computed
        opened = torch.cat((nodes.masked_fill(~counted, FAR), before), dim=1).sort(dim=1).values
        level -= 1
        nodes = _ending(children(opened, walks.branching).flatten(1), walks.ending(level))
        found = score(walks, levels[level], nodes)


def leaves_above(
    walks: Walks, levels: tuple[Tensor, ...], threshold: Float[Tensor, " r"]
) -> tuple[Int[Tensor, "r n"], Float[Tensor, "r n"], list[int]]:
    """Every leaf that can be chosen under nodes whose scores all reach the threshold, with its score (-inf: padding),
    and how many nodes of each level were scored.
    """
    depth, device, looked_at = _levels(walks), walks.query.device, []
    walk = torch.arange(len(walks.query), device=device)
    nodes = torch.zeros_like(walk)
    for level in reversed(range(depth)):
        before = walks.ending(level)
        walk, nodes = walk.repeat_interleave(walks.branching), children(nodes, walks.branching).flatten()
        inside = nodes < before[walk]
        walk, nodes = walk[inside], nodes[inside]
        found = pair_scores(walks, levels[level], walk, nodes)
        looked_at.append(len(walk))
        if level:
            opened = ~(found < threshold[walk])  # nothing is known of what is under a bound that is no number
            lies_in = torch.arange(len(before), device=device)
            walk, nodes = torch.cat((walk[opened], lies_in)), torch.cat((nodes[opened], before))
    chosen = walks.candidates(nodes, walks.complete[walk], True) & (found > float("-inf"))
    return *_padded(walk[chosen], nodes[chosen], found[chosen], len(walks.query)), looked_at[::-1]


def children(nodes: Int[Tensor, "*shape"], branching: int) -> Int[Tensor, "*shape b"]:
    """The numbers of each node's children on the level below."""
    return nodes[..., None] * branching + torch.arange(branching, device=nodes.device)


def every_score(walks: Walks, nodes: Float[Tensor, "B g n W"]) -> Float[Tensor, "r n"]:
    """The scores of all nodes of a level, as matrix products: no walk has left any out yet."""
    batch, groups, number, width = nodes.shape
    query = walks.query.view(-1, batch, groups, walks.heads // groups, width).permute(1, 2, 0, 3, 4)
    found = query.reshape(batch, groups, -1, width) @ nodes.transpose(2, 3)
    found = found.view(batch, groups, -1, walks.heads // groups, number)
    return found.permute(2, 0, 1, 3, 4).reshape(-1, number)


def score(walks: Walks, level: Float[Tensor, "B g N W"], nodes: Int[Tensor, "r n"]) -> Float[Tensor, "r n"]:
    """The scores of each walk's nodes; of those that do not exist, any."""
    rows = level.flatten(0, 1).flatten(0, 1)
    row = walks.tree[:, None] * level.shape[2] + nodes.clamp(max=level.shape[2] - 1)
    step = max(1, PIECE // max(1, rows.shape[1] * nodes.shape[1]))
    parts = []
    for query, piece in zip(walks.query.split(step), row.split(step), strict=True):
        gathered = rows.index_select(0, piece.flatten()).view(*piece.shape, rows.shape[1])
        parts.append(gathered.mul_(query[:, None]).sum(dim=2))
    return torch.cat(parts)


def pair_scores(
    walks: Walks, level: Float[Tensor, "B g N W"], walk: Int[Tensor, " n"], nodes: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """query . node for pairs of a walk and a node. Every score is summed in the same order, so bounds stay monotone."""
    rows = level.flatten(0, 1).flatten(0, 1)
    row = walks.tree[walk] * level.shape[2] + nodes.clamp(max=level.shape[2] - 1)
    step = max(1, PIECE // rows.shape[1])
    parts = []
    for i in range(0, max(1, len(row)), step):
        piece = rows.index_select(0, row[i : i + step])
        parts.append(piece.mul_(walks.query.index_select(0, walk[i : i + step])).sum(dim=1))
    return torch.cat(parts)


def _ending(nodes: Int[Tensor, "r n"], before: Int[Tensor, " r"]) -> Int[Tensor, "r m"]:
    """Ascending nodes without the columns in which no walk has one that ends before its query."""
    return nodes[:, : int((nodes < before[:, None]).sum(dim=1).max())]


def _levels(walks: Walks) -> int:
    """Levels on which the longest walk has a node that ends before it."""
    depth = 1
    while walks.longest >= walks.branching**depth:
        depth += 1
    return depth


def _first_pruned(walks: Walks) -> int:
    """The highest level on which a walk has to leave a node out, or the leaves."""
    for level in reversed(range(1, _levels(walks))):
        if bool((walks.ending(level) > walks.beam).any()):
            return level
    return 0


def _padded(walk: Tensor, nodes: Tensor, found: Tensor, walks: int) -> tuple[Tensor, Tensor]:
    """Pairs in any order as a row per walk, nodes ascending."""
    order = (walk * (int(nodes.max()) + 1 if len(nodes) else 1) + nodes).argsort()
    walk, nodes, found = walk[order], nodes[order], found[order]
    count = torch.bincount(walk, minlength=walks)
    place = torch.arange(len(walk), device=walk.device) - (count.cumsum(0) - count)[walk]
    most = int(count.max())
    rows = torch.full((walks, most), FAR, device=walk.device)
    scores = torch.full((walks, most), float("-inf"), dtype=found.dtype, device=walk.device)
    rows[walk, place], scores[walk, place] = nodes, found
    return rows, scores
