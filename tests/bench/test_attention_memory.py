"""Attention holds no n x n object; the meter counts what operators take inside too, as the C++ kernel does."""

import pytest
import torch
from torch import Tensor

from bench import block_attention
from bench.attention_sizes import BLOCK, HEADS
from bench.meters.memory import peak_bytes
from dsv3.attention import Implementation, attend
from dsv3.config import Auto, Blocks, PerHead, Select, vary
from tests.attention.lists import by_cpu, needs_kernel
from tests.attention.variants import SELECTS, chosen

LENGTH = 4096


def enlarged(select: Select) -> Select:
    """Blocks of a size that is used: lists of a long sequence's pairs of tokens would be quadratic by themselves."""
    if isinstance(select, Auto):
        return vary(select, block_q=BLOCK, block_k=BLOCK, crossover=LENGTH // 4)
    return vary(select, block_q=BLOCK, block_k=BLOCK) if isinstance(select, Blocks) else select


def leaves_of(select: Select) -> tuple[Tensor, ...]:
    """Queries, keys, values, and the importance of tokens where it selects."""
    generator, shapes = torch.Generator().manual_seed(0), [(1, 2, LENGTH, 16), *[(1, 1, LENGTH, 16)] * 2]
    shapes += [(1, 2, LENGTH)] if isinstance(select, PerHead) else []
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


@by_cpu
@pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS.keys())
def test_no_selection_takes_memory_for_all_pairs(select: Select, implementation: Implementation) -> None:
    select = enlarged(select)

    def attended(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, k, v = leaves[:3]
        importance = leaves[3] if len(leaves) > 3 else q.new_zeros(1, 2, LENGTH)
        selection = chosen(select, importance, LENGTH, 4 * BLOCK, (q.detach(), k.detach()))
        out = attend(q, k, v, selection, implementation=implementation)
        return out, *torch.autograd.grad(out, leaves, q.detach())

    given = leaves_of(select)
    results = given[0].nbytes + sum(x.nbytes for x in given)  # the output, as large as queries, and the gradients
    peak = peak_bytes(lambda: leaves_of(select), attended)[0].value
    # half a mask of a byte for each pair, the least that an n x n object takes: in forward there are no gradients yet,
    # in whose place it could stand. Scores in fp32 take eight times as much
    assert results <= peak < results + LENGTH**2 / 2


@needs_kernel
def test_attention_down_a_tree_takes_at_most_a_hundredth_of_the_scores_of_eager_attention() -> None:
    """16 blocks of 64 keys, forward and backward, choosing included; eager attention holds more than its scores."""
    length = 16384
    given = block_attention.inputs(length, torch.float32)
    results = given.q.nbytes + sum(x.nbytes for x in (given.q, given.k, given.v))
    scores = length**2 * HEADS * given.q.element_size()

    def trained(given: block_attention.Inputs) -> tuple[Tensor, ...]:
        return block_attention.training("hierarchical", given)

    peak = peak_bytes(lambda: block_attention.inputs(length, torch.float32), trained)[0].value
    assert results <= peak <= results + scores / 100
