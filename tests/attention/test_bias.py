"""A bias for each listed block: as defined in values and gradients, whatever the lists, in plain PyTorch and in C++."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.attention import Selection, attend, implementation, reference
from dsv3.attention.choice import Implementation
from dsv3.attention.kernels import blocks, registration
from tests.attention.lists import SHAPES, by_cpu, close, draw, grads, needs_kernel, select
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


def defined(
    leaves: tuple[Tensor, ...], selection: Selection, weights: Tensor | None = None, scale: float = 0.7
) -> Tensor:
    q, k, v = leaves
    shape = {"heads": q.shape[1], "queries": q.shape[2], "total": k.shape[2]}
    seen, bias = reference.selected(selection, **shape), reference.selected_bias(selection, **shape)
    return reference.attention(q, k, v, seen, scale=scale, weights=weights, bias=bias)


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


@by_cpu
def test_lists_out_of_order_carry_their_bias(implementation: Implementation) -> None:
    shape = (2, 2, 2, 2, 200, 200, 16, 16, 64, 32)
    leaves, selection = draw(shape), select(shape)
    mixed = untidy(selection, future=6)
    by_block = torch.randn(7, generator=torch.Generator().manual_seed(5)).requires_grad_()  # alike for all lists

    def found(lists: Selection) -> tuple[Tensor, ...]:
        out = attend(*leaves, replace(lists, bias=by_block[lists.indices]), implementation=implementation)
        return out, *grads(out, (*leaves, by_block))

    assert all(torch.equal(one, two) for one, two in zip(found(selection), found(mixed), strict=True))
    assert not torch.equal(found(selection)[0], attend(*leaves, selection, implementation=implementation))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "instructions"),
    [(name, "") for name in (*SHAPES, *MORE)]
    + [(name, more) for name in ("one by one", "long blocks") for more in ("avx512", "avx2", "portable")],
)
def test_the_kernel_computes_the_definition(name: str, dtype: torch.dtype, instructions: str) -> None:
    if instructions and instructions not in blocks.instruction_sets():
        pytest.skip(f"this processor lacks {instructions}")
    shape = (SHAPES | MORE)[name]
    leaves, selection = draw(shape, dtype), biased(select(shape), torch.float32)
    weights = torch.randn(shape[0], shape[3], shape[5], generator=torch.Generator().manual_seed(6)).requires_grad_()
    both = replace(selection, weights=weights)
    ours = blocks.block_attention(*leaves, both, scale=0.3, instructions=instructions)
    theirs = defined(leaves, selection, weights.repeat_interleave(shape[1] // shape[3], dim=1), scale=0.3)
    # weights and biases make scores larger than in test_kernel, and a softmax errs as they do
    given, error = (*leaves, weights, selection.bias), 3e-6 if dtype == torch.float32 else 2e-2
    close(ours, theirs, error)
    *pairs, (mine, exact) = zip(grads(ours, given), grads(theirs, given), strict=True)
    close(mine, exact, 10 * error)  # a sum over all pairs of two blocks, most of which cancel
    for mine, exact in pairs:
        close(mine, exact, error)


@needs_kernel
@pytest.mark.parametrize("groups", [1, 4], ids=["tile by tile", "head by head"])
@pytest.mark.parametrize(("block_q", "block_k"), [(1, 5), (3, 9), (100, 48), (100, 200)])
def test_the_number_of_threads_changes_no_bit(groups: int, block_q: int, block_k: int) -> None:
    shape = (2 if groups == 4 else 1, 4, groups, 4, 350, 350, 20, 32, block_q, block_k)
    weights = torch.randn(shape[0], 4, 350, generator=torch.Generator().manual_seed(6)).requires_grad_()
    leaves, selection = draw(shape), replace(biased(select(shape), torch.float32), weights=weights)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = attend(*leaves, selection, implementation="kernel")
            found.append((out, *grads(out, (*leaves, selection.bias, selection.weights))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_the_triton_kernel_refuses_it_by_name() -> None:
    shape = (1, 2, 2, 2, 100, 100, 16, 16, 64, 32)
    leaves, selection = draw(shape), biased(select(shape), torch.float32)
    assert implementation(leaves[0], selection) == implementation(leaves[0], replace(selection, bias=None))
    with pytest.raises(ValueError, match=r"adds no bias to listed blocks|cannot be used here"):
        attend(*leaves, selection, implementation="triton")


@by_cpu
@pytest.mark.parametrize("block_q", [1, 64], ids=["one by one", "tiles"])
def test_a_query_whose_blocks_all_weigh_nothing_gets_and_gives_nothing(
    block_q: int, implementation: Implementation
) -> None:
    shape = (1, 2, 2, 2, 100, 100, 16, 16, block_q, 8)
    leaves, selection = draw(shape), select(shape)
    bias = torch.zeros(selection.indices.shape)
    bias[:, :, 1] = float("-inf")
    out = attend(*leaves, replace(selection, bias=bias.requires_grad_()), implementation=implementation)
    given = grads(out, (*leaves, bias))
    rows = slice(block_q, 2 * block_q)
    assert not any(x.any() for x in (out[:, :, rows], given[0][:, :, rows], given[-1][:, :, 1]))
    assert all(x.isfinite().all() for x in given)


@needs_kernel
def test_the_operator_refuses_lists_in_which_a_bias_has_no_place() -> None:
    shape = (1, 2, 2, 2, 100, 100, 16, 16, 64, 32)
    leaves, selection = draw(shape), biased(select(shape, keep=1.0), torch.float32)
    given = registration.arguments(*leaves, selection, 0.3)
    forward = torch.ops.dsv3_kernels.forward
    forward(*given, "")
    for wrong in (selection.indices.flip(-1), torch.zeros_like(selection.indices)):
        with pytest.raises(ValueError, match="indices: with a bias must be ascending"):
            forward(*given[:3], wrong, *given[4:], "")
    with pytest.raises(ValueError, match="bias: must be"):
        forward(*given[:-1], given[-1][..., 1:], "")
    with pytest.raises(ValueError, match="bias: belongs to listed blocks"):
        forward(*given[:3], None, None, *given[5:], "")


def test_a_bias_of_another_shape_is_refused() -> None:
    shape = (1, 2, 2, 2, 100, 100, 16, 16, 64, 32)
    leaves, selection = draw(shape), select(shape)
    # where shapes are checked as values are made, none with such a bias could be
    object.__setattr__(selection, "bias", torch.zeros(1, 2, 2, 9))
    with pytest.raises(ValueError, match=r"selection.bias.shape=\(1, 2, 2, 9\): must be \(1, 2, 2, \d\)"):
        attend(*leaves, selection)
