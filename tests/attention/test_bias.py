"""A bias for each listed block: as defined in values and gradients, whatever the lists, and in the plain path alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.attention import Selection, attend, implementation, reference
from tests.attention.lists import SHAPES, close, draw, grads, select
from tests.attention.test_contract import FLOAT64
from tests.attention.test_lists import untidy

MORE = {
    "single queries": (2, 4, 2, 4, 30, 40, 8, 6, 1, 4),
    "single queries of a group": (1, 4, 2, 2, 30, 30, 8, 8, 1, 4),
    "single queries of all": (2, 4, 2, 1, 30, 33, 8, 8, 1, 4),
}


def biased(selection: Selection, dtype: torch.dtype = torch.float64) -> Selection:
    bias = torch.randn(selection.indices.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return replace(selection, bias=bias.requires_grad_())


def defined(leaves: tuple[Tensor, ...], selection: Selection, weights: Tensor | None = None) -> Tensor:
    q, k, v = leaves
    shape = {"heads": q.shape[1], "queries": q.shape[2], "total": k.shape[2]}
    seen, bias = reference.selected(selection, **shape), reference.selected_bias(selection, **shape)
    return reference.attention(q, k, v, seen, scale=0.7, weights=weights, bias=bias)


@pytest.mark.parametrize("keep", [0.4, 1.0], ids=["some", "all"])  # all: runs of neighbours, sliced
@pytest.mark.parametrize("shape", [*SHAPES.values(), *MORE.values()], ids=[*SHAPES, *MORE])
def test_values_and_gradients_are_those_of_the_definition(shape: tuple[int, ...], keep: float) -> None:
    leaves = draw(shape, torch.float64)
    selection = biased(select(shape, keep))
    ours, theirs = attend(*leaves, selection, scale=0.7), defined(leaves, selection)
    close(ours, theirs, FLOAT64)
    given = (*leaves, selection.bias)
    for mine, exact in zip(grads(ours, given), grads(theirs, given), strict=True):
        close(mine, exact, FLOAT64)


def test_a_bias_and_weights_add_up() -> None:
    shape = MORE["single queries"]
    leaves, selection = draw(shape, torch.float64), biased(select(shape))
    weights = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    both = replace(selection, weights=weights)
    ours, theirs = attend(*leaves, both, scale=0.7), defined(leaves, selection, weights)
    given = (*leaves, selection.bias, weights)
    for mine, exact in zip((ours, *grads(ours, given)), (theirs, *grads(theirs, given)), strict=True):
        close(mine, exact, FLOAT64)


def test_lists_out_of_order_carry_their_bias() -> None:
    shape = (2, 2, 2, 2, 200, 200, 16, 16, 64, 32)
    leaves, selection = draw(shape, torch.float64), select(shape)
    mixed = untidy(selection, future=6)
    by_block = torch.randn(7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # alike for all lists
    one, two = (attend(*leaves, replace(s, bias=by_block[s.indices])) for s in (selection, mixed))
    assert torch.equal(one, two)
    assert not torch.equal(one, attend(*leaves, selection))


def test_the_kernels_leave_it_to_the_plain_path_and_refuse_it_by_name() -> None:
    shape = (1, 2, 2, 2, 100, 100, 16, 16, 64, 32)
    leaves, selection = draw(shape), biased(select(shape), torch.float32)
    assert implementation(leaves[0], selection) == "plain"
    for name in ("kernel", "triton"):
        with pytest.raises(ValueError, match=rf"implementation='{name}': (must be 'plain' for|cannot be used here)"):
            attend(*leaves, selection, implementation=name)


def test_a_bias_of_another_shape_is_refused() -> None:
    shape = (1, 2, 2, 2, 100, 100, 16, 16, 64, 32)
    leaves, selection = draw(shape), select(shape)
    # where shapes are checked as values are made, none with such a bias could be
    object.__setattr__(selection, "bias", torch.zeros(1, 2, 2, 9))
    with pytest.raises(ValueError, match=r"selection.bias.shape=\(1, 2, 2, 9\): must be \(1, 2, 2, \d\)"):
        attend(*leaves, selection)
