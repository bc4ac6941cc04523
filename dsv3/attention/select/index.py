"""What choosing by content remembers of past tokens: the query that chooses for each block, and summaries of keys.

    leader of query block i    the query of its first token
    node j of level 0          a summary of the keys j * block_k ... (j + 1) * block_k - 1
    node j of level l          a summary of its children, the nodes j * b ... (j + 1) * b - 1 of level l - 1

A summary is the mean, or the smallest and the largest number of each column (for bounds). A node is written once, when
its last token is there, from tokens alone: so a tree grown token by token while decoding is the tree of a prefill, and
goes on from any earlier length. Growing costs O(1) per token, and the tree holds 1/block_k * b/(b-1) of the keys.

For bounds the index also keeps how large the finite numbers of all leaves up to each are: so much a sum over them may
err.

Leaders and nodes are kept in fp32 or wider, without a graph: which blocks are seen has no gradient. Keys learn to be
found by being attended to, as in MoBA (arXiv 2502.13189), or in one of the ways of `learning`. What the newest block of
queries chose is kept besides, see `latest`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention.select.latest import Latest
from dsv3.config import Blocks, Hierarchical

_WIDENED = 1024  # keys of a head that are copied at once


@dataclass(frozen=True)
class Index:
    """Leaders and the levels of nodes, leaves first; h leaders per block of queries, g rows of nodes, h a multiple of
    g. Where nodes are bounds: the largest size of a finite number in the leaves up to each. Where the index is to be
    continued: a place for the latest choice.
    """

    leaders: Float[Tensor, "B h Nq P"]
    nodes: tuple[Float[Tensor, "B g _ W"], ...]
    largest: Float[Tensor, "B g _"] | None = None
    latest: Latest | None = None

    @classmethod
    def empty(
        cls,
        choice: Blocks,
        shape: tuple[int, int, int, int],
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Index":
        """Room for `length` tokens; `shape` is batch, query heads, key heads and width, before any sharing."""
        batch, heads, groups, width = shape
        match choice.sharing:
            case "group":
                heads = groups
            case "all":
                heads, groups, width = 1, 1, groups * width
        kind = torch.promote_types(dtype, torch.float32)
        # a token that chooses for itself alone needs no memory of its query
        blocks = 0 if choice.block_q == 1 else -(-length // choice.block_q)
        leaders = torch.zeros(batch, heads, blocks, width, dtype=kind, device=device)
        columns = width * (2 if bounds(choice) else 1)
        nodes = tuple(
            torch.zeros(batch, groups, length // span, columns, dtype=kind, device=device)
            for span in spans(choice, length)
        )
        largest = torch.zeros_like(nodes[0][..., 0]) if bounds(choice) else None
        return cls(leaders, nodes, largest, Latest())

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not; not of the one list of the latest choice."""
        largest = 0 if self.largest is None else self.largest.nbytes
        return self.leaders.nbytes + sum(level.nbytes for level in self.nodes) + largest

    @torch.no_grad()
    def extend(
        self,
        choice: Blocks,
        q: Float[Tensor, "B H n P"],
        k: Float[Tensor, "B G m P"],
        start: int,
        total: int,
        *,
        first: int | None = None,
    ) -> "Index":
        """Write what the tokens from `start` to `total` add, in place; returns the leaders of the blocks from the one
        of position `first` (`start`) on, and all nodes.

        q holds the queries of `leading(choice, first)` among the new tokens; k all keys from `unfinished` on.
        """
        kind, last = self.leaders.dtype, -(-total // choice.block_q)
        if choice.block_q == 1:
            leaders = shared_queries(choice, q.to(kind), k.shape[1])
        else:
            if q.shape[2]:
                self.leaders[:, :, last - q.shape[2] : last] = shared_queries(choice, q.to(kind), k.shape[1])
            leaders = self.leaders[:, :, (start if first is None else first) // choice.block_q : last]
        if total // choice.block_k > start // choice.block_k:
            self._extend_nodes(choice, k, start, total)
        return Index(leaders, self.nodes, self.largest, self.latest)

    def _extend_nodes(self, choice: Blocks, k: Float[Tensor, "B G m P"], start: int, total: int) -> None:
        """Write the nodes that the tokens from `start` to `total` complete, level by level as long as there are any."""
        below, offset, ratio = shared_keys(choice, k), unfinished(choice, start), choice.block_k
        for at, (level, span) in enumerate(zip(self.nodes, spans(choice, total), strict=False)):
            low, high = start // span, total // span
            if low == high:
                break
            part = below[:, :, low * ratio - offset : high * ratio - offset].unflatten(2, (high - low, ratio))
            if not bounds(choice):
                level[:, :, low:high] = _means(part, level.dtype)
            else:
                # of keys in their own type, and each key once: no copy of all of them either
                largest, smallest = part.chunk(2, dim=-1) if at else (part, part)
                level[:, :, low:high] = torch.cat((largest.amax(dim=3), smallest.amin(dim=3)), dim=-1)
            below, offset, ratio = level, 0, choice.branching if isinstance(choice, Hierarchical) else 1
        if self.largest is not None:
            _extend_largest(self.largest, self.nodes[0], start // choice.block_k, total // choice.block_k)


def bounds(choice: Blocks) -> bool:
    """Whether summaries bound the scores of what they stand for."""
    return isinstance(choice, Hierarchical) and choice.search == "best_first"


def spans(choice: Blocks, length: int) -> list[int]:
    """Tokens under a node, level by level from the leaves, as long as `length` tokens fill a node; a level at least."""
    found = [choice.block_k]
    if isinstance(choice, Hierarchical):
        while found[-1] * choice.branching <= length:
            found.append(found[-1] * choice.branching)
    return found


def leading(choice: Blocks, start: int) -> slice:
    """Which of the tokens from position `start` on choose: the first of each block of queries."""
    return slice(-start % choice.block_q, None, choice.block_q)


def unfinished(choice: Blocks, start: int) -> int:
    """Where the key block of position `start` begins: no earlier key is in a node that is yet to be written."""
    return start // choice.block_k * choice.block_k


def shared_queries(choice: Blocks, q: Float[Tensor, "B H n P"], groups: int) -> Float[Tensor, "B h n W"]:
    """What chooses: a score is linear in the query, so the mean of the heads' queries has the mean of their scores."""
    if choice.sharing == "head":
        return q
    mean = q.unflatten(1, (groups, -1)).mean(dim=2)
    return mean if choice.sharing == "group" else mean.transpose(1, 2).flatten(2)[:, None] / groups


def shared_keys(choice: Blocks, k: Float[Tensor, "B G m P"]) -> Float[Tensor, "B g m W"]:
    """What it is compared with."""
    return k.transpose(1, 2).flatten(2)[:, None] if choice.sharing == "all" else k


def _means(part: Float[Tensor, "B g n c W"], dtype: torch.dtype) -> Float[Tensor, "B g n W"]:
    """The means of each c keys in `dtype`, of a few nodes at a time where keys are narrower: a wider copy of all keys
    would be what a choice costs most memory.
    """
    if part.dtype == dtype:
        return part.mean(dim=3)
    some = part.split(_WIDENED // part.shape[3] + 1, dim=2)
    return torch.cat([few.to(dtype).mean(dim=3) for few in some], dim=2)


def _extend_largest(largest: Float[Tensor, "B g n"], leaves: Float[Tensor, "B g n W"], low: int, high: int) -> None:
    """Write what the leaves from `low` to `high` make of the largest number so far."""
    size = leaves[:, :, low:high].abs()
    size = size.masked_fill(~size.isfinite(), 0).amax(dim=-1)
    before = largest[:, :, max(0, low - 1) : low]
    largest[:, :, low:high] = torch.cat((before, size), dim=-1).cummax(dim=-1).values[..., before.shape[-1] :]


def query_vectors(choice: Blocks, leaders: Float[Tensor, "*rows P"]) -> Float[Tensor, "*rows W"]:
    """What a node is multiplied with: the query; for bounds its positive part against the largest numbers of the keys
    and its negative part against the smallest.
    """
    return torch.cat((leaders.clamp(min=0), leaders.clamp(max=0)), dim=-1) if bounds(choice) else leaders
