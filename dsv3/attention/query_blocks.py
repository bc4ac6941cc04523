"""The plain path's blocks of queries, each with the tokens listed for it and a penalty on those that it does not see.

    penalty = 0 where j <= t and rank[j] <= limit[t], else far below

Where every token has a list of its own, many tokens are computed at once, as a batch of short sequences, and the heads
that share a list and keys become rows of one matrix against keys gathered once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.attention.selection import Selection

UNSEEN = 2.0**100  # finite: a kernel's tile in which a query sees nothing yields no NaN; a power of two: exact products
GATHERED = 2**22  # bytes of keys and values gathered at once for single tokens: more leave the cache, fewer cost calls


@dataclass(frozen=True)
class QueryBlock:
    """A block of queries and the keys listed for it: the same run for all heads, or tokens per head; or single queries,
    as a batch, each with its tokens. `lists`: which rows of the selection say so, in blocks of `block_k` keys.
    """

    rows: slice
    lists: slice
    block_k: int
    run: slice | None
    tokens: Int[Tensor, "B h n"] | Int[Tensor, "B h C n"]
    penalty: Float[Tensor, "B heads C n"] | Float[Tensor, "B*C heads 1 n"]

    @property
    def single(self) -> bool:
        """Whether every query has tokens of its own."""
        return self.tokens.ndim == 4

    def heads(self, q: Tensor, k: Tensor) -> int:
        """Heads of the operands: all, or one for those that share a list and keys."""
        return max(k.shape[1], self.tokens.shape[1]) if self.single else q.shape[1]

    def cut(self, x: Float[Tensor, "B H T *width"], heads: int) -> Float[Tensor, "_ heads _ *width"]:
        """What x has of these queries, as the fused kernel takes it."""
        rows = x[:, :, self.rows]
        return rows.unflatten(1, (heads, -1)).movedim(3, 1).flatten(0, 1) if self.single else rows

    def put(self, x: Float[Tensor, "B H T *width"], part: Float[Tensor, "_ heads _ *width"]) -> None:
        """Write what the fused kernel gave for these queries."""
        if self.single:
            part = part.unflatten(0, (len(x), -1)).movedim(1, 3).flatten(1, 2)
        x[:, :, self.rows] = part


def query_blocks(selection: Selection, q: Tensor, total: int, key_bytes: int) -> Iterator[QueryBlock]:
    """The blocks of queries that list a key, each with its keys and its penalty, which is good until the next block;
    single queries as many together as fit, at `key_bytes` for each key that one lists.
    """
    queries, size = q.shape[2], selection.block_q
    position = torch.arange(total - queries, total, device=q.device)
    longest, runs = selection.counts.amax(dim=(0, 1)).tolist(), _runs(selection, total)
    # one buffer for all penalties: fresh memory for every block would cost more than filling it
    most = selection.counts[..., 0].numel() * min(size, queries) * max(longest) * selection.block_k
    room = q.new_empty(most, dtype=torch.promote_types(q.dtype, torch.float32))
    first = 0
    while first < len(runs):
        run, last = runs[first], first + 1
        if longest[first] == 0:
            first = last
            continue
        if size == 1 and run is None:
            last = _last_alike(longest, runs, first, GATHERED // (longest[first] * selection.block_k * key_bytes))
            tokens = _listed(selection, slice(first, last), longest[first], total)
        elif run is None:
            tokens = _listed(selection, slice(first, last), longest[first], total)[:, :, 0]
        else:
            tokens = torch.arange(run.start, run.stop, device=q.device).expand(*selection.counts.shape[:2], -1)
        rows = slice(first * size, min(last * size, queries))
        penalty = _penalty(selection, tokens, position[rows], rows, room)
        if tokens.ndim == 3 and 1 < penalty.shape[1] < q.shape[1]:  # the kernel takes a mask for all heads or one each
            penalty = penalty.repeat_interleave(q.shape[1] // penalty.shape[1], dim=1)
        lists = slice(first, last)
        yield QueryBlock(rows, lists, selection.block_k, run, tokens.clamp(max=total - 1), penalty)
        first = last


def _last_alike(longest: list[int], runs: list[slice | None], first: int, most: int) -> int:
    """Where the queries end that follow the first with lists as long as its own, at most so many; one at least."""
    last = first + 1
    while last < min(len(runs), first + most) and runs[last] is None and longest[last] == longest[first]:
        last += 1
    return last


def _listed(selection: Selection, blocks: slice, longest: int, total: int) -> Int[Tensor, "B h N n"]:
    """The tokens that these blocks of queries list; past the end, where no query sees them, behind shorter lists."""
    listed = torch.arange(longest, device=selection.indices.device) < selection.counts[:, :, blocks, None]
    named = selection.indices[:, :, blocks, :longest].masked_fill(~listed, total)
    inside = torch.arange(selection.block_k, device=named.device)
    return (named[..., None] * selection.block_k + inside).flatten(-2)


def _runs(selection: Selection, total: int) -> list[slice | None]:
    """Per block of queries: the listed tokens as one slice, if all heads and sequences list the same neighbours."""
    first = selection.indices[..., 0]
    last = selection.indices.gather(-1, (selection.counts[..., None] - 1).clamp(min=0).long()).squeeze(-1)
    alike = (last - first + 1 == selection.counts) & (first == first[:1, :1]) & (last == last[:1, :1])
    edges = zip(alike.flatten(0, 1).all(dim=0).tolist(), first[0, 0].tolist(), last[0, 0].tolist(), strict=True)
    size = selection.block_k
    return [slice(start * size, min((stop + 1) * size, total)) if run else None for run, start, stop in edges]


def _penalty(
    selection: Selection, tokens: Tensor, position: Tensor, rows: slice, room: Tensor
) -> Float[Tensor, "_ h _ n"]:
    """0 where the query sees the key, far below elsewhere: two passes, where a comparison and a choice take five."""
    if tokens.ndim == 4:
        return _penalty_of_singles(selection, tokens, position, rows, room.dtype)
    past = (tokens <= position[0]).sum(-1).amin()
    shape = (*tokens.shape[:-1], len(position), tokens.shape[-1])
    penalty = room[: math.prod(shape)].view(shape)
    if selection.rank is not None and selection.limit is not None:
        rank = selection.rank.gather(-1, tokens.clamp(max=selection.rank.shape[-1] - 1))
        torch.sub(*_spread(rank[..., None, :], selection.limit[:, :, rows], room.dtype), out=penalty).clamp_(max=0)
    else:
        penalty.zero_()
    late = tokens[..., past:]
    penalty[..., past:] += torch.sub(*_spread(late[..., None, :], position, room.dtype)).clamp_(max=0)
    return penalty


def _penalty_of_singles(
    selection: Selection, tokens: Int[Tensor, "B h C n"], position: Tensor, rows: slice, dtype: torch.dtype
) -> Float[Tensor, "B*C h 1 n"]:
    """The same for queries of which each has tokens of its own."""
    penalty = torch.sub(*_spread(tokens, position, dtype)).clamp_(max=0)
    if selection.rank is not None and selection.limit is not None:
        rank = selection.rank.gather(-1, tokens.clamp(max=selection.rank.shape[-1] - 1).flatten(2)).view_as(tokens)
        penalty += torch.sub(*_spread(rank, selection.limit[:, :, rows], dtype)).clamp_(max=0)
    return penalty.transpose(1, 2).flatten(0, 1)[:, :, None]


def _spread(number: Int[Tensor, "B h _ n"], most: Int[Tensor, "*heads C"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors whose difference [B, h, C, n] is 0 or above where number <= most, else at most -UNSEEN."""
    return most.to(dtype)[..., None] * UNSEEN, number.to(dtype) * UNSEEN
