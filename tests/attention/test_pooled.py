"""The branch over means of blocks: against loops, whatever the block and wherever the queries begin."""

import itertools

import pytest
import torch
from torch import Tensor

from dsv3.attention import reference
from dsv3.attention.pooled import joined, pooled
from tests.attention.test_contract import FLOAT64


def draw(heads: int, groups: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def one(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()

    return one(2, total, heads, 6), one(2, total, groups, 6), one(2, total, groups, 4)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("block", [1, 3, 4, 16])
@pytest.mark.parametrize("queries, total", [(1, 1), (15, 15), (16, 16), (17, 17), (33, 33), (1, 33), (6, 18), (18, 21)])
def test_values_and_gradients_are_those_of_the_definition(
    heads: int, groups: int, block: int, queries: int, total: int
) -> None:
    leaves = draw(heads, groups, total)
    q, k, v = leaves
    ours = pooled(q[:, :, total - queries :], k, v, block, scale=0.7)
    theirs = reference.pooled(q, k, v, block, scale=0.7)[:, :, total - queries :]
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)
    blind = max(0, block - 1 - (total - queries))
    assert bool((ours[:, :, :blind] == 0).all()), "a query without a complete block behind it gets 0"
    if blind < queries:
        pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = (torch.autograd.grad(out, leaves, pull) for out in (ours, theirs))
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("pieces", [[1] * 21, [5, 1, 9, 6], [8, 13], [21]])
def test_a_cache_of_means_gives_the_same_and_spares_reading_the_blocks_again(pieces: list[int]) -> None:
    q, k, v = (leaf.detach() for leaf in draw(4, 2, 21))
    whole = pooled(q, k, v, 4, scale=0.7)
    held, start = (torch.full_like(k[:, :, ::4], torch.nan), torch.full_like(v[:, :, ::4], torch.nan)), 0
    for stop in itertools.accumulate(pieces):
        seen = [x[:, :, :stop].clone() for x in (k, v)]
        for x in seen:
            x[:, :, : start // 4 * 4] = torch.nan  # their means are held
        piece = pooled(q[:, :, start:stop], *seen, 4, scale=0.7, held=held)
        torch.testing.assert_close(piece, whole[:, :, start:stop], rtol=FLOAT64, atol=FLOAT64)
        start = stop


def test_gates_weigh_the_branch_and_the_selection_of_each_head() -> None:
    far = 40.0  # sigmoid is 1, or below 1e-17
    gates = torch.tensor([[[far, -far, -far, 0.0]]], dtype=torch.float64)  # heads of the branch, then of the selection
    branch = torch.full((1, 2, 1, 3), 2.0, dtype=torch.float64)
    selected = torch.full((1, 2, 1, 3), 8.0, dtype=torch.float64)
    expected = torch.tensor([2.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    torch.testing.assert_close(joined(gates, branch, selected), expected, rtol=0, atol=1e-15)
