"""The scores of listed blocks, with gradient: query . mean, for the k blocks that each query lists, and for no other.

Backward gathers the means again, piece by piece: kept are the queries, the means and the lists, and no k W numbers a
query.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.attention.select.scores import chunks


def block_scores(
    leaders: Float[Tensor, "B h n W"], means: Float[Tensor, "B g N W"], indices: Int[Tensor, "B h n K"]
) -> Float[Tensor, "B h n K"]:
    """leaders . means of the listed blocks, h a multiple of g; of blocks that do not exist, any number."""
    if means.shape[2] == 0:
        return leaders.new_zeros(indices.shape)
    return _BlockScores.apply(leaders, means, indices)


def listed_rows(indices: Int[Tensor, "B h n K"], groups: int, blocks: int) -> Int[Tensor, "B h n K"]:
    """Where the listed blocks stand among the rows of all sequences, groups and blocks."""
    batch, heads = indices.shape[:2]
    tree = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1, 1) // (heads // groups)
    return tree * blocks + indices.clamp(max=blocks - 1)


class _BlockScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaders: Tensor, means: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(leaders, means, indices)
        rows, place, pieces = _pieces(means, indices)
        out = leaders.new_empty(indices.shape)
        for piece in pieces:
            out[:, :, piece] = (rows[place[:, :, piece]] * leaders[:, :, piece, None]).sum(dim=-1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        leaders, means, indices = ctx.saved_tensors
        rows, place, pieces = _pieces(means, indices)
        grad_leaders, grad_rows = leaders.new_empty(leaders.shape), rows.new_zeros(rows.shape)
        for piece in pieces:
            part = grad[:, :, piece, :, None]
            grad_leaders[:, :, piece] = (part * rows[place[:, :, piece]]).sum(dim=3)
            of_rows = (part * leaders[:, :, piece, None]).flatten(0, 3)
            grad_rows.index_add_(0, place[:, :, piece].flatten(), of_rows)
        return grad_leaders, grad_rows.view(means.shape), None


def _pieces(means: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, list[slice]]:
    """The means as rows of one matrix, where the listed ones stand in it, and pieces of queries that fit."""
    batch, heads, queries, most = indices.shape
    place = listed_rows(indices, means.shape[1], means.shape[2])
    rows = means.reshape(-1, means.shape[-1])
    return rows, place, chunks(queries, batch * heads * most * means.shape[-1])
