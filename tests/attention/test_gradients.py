"""Gradients asked for apart, and those of documents packed into one sequence."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsv3.attention import attend
from dsv3.attention.select import blocks, hierarchical
from dsv3.config import Blocks, Everything, Hierarchical, PerHead, Select, Window
from tests.attention.lists import by_cpu, close, draw, grads
from tests.attention.variants import ATTENTIONS, config, hidden, module

SELECTS: dict[str, Select] = {
    "everything": Everything(),
    "window": Window(size=20, sink=2),
    "per_head": PerHead(k=9),
    "kernel": Hierarchical(k=4, block_q=16, block_k=16),
    "plain": Blocks(k=5, block_q=8, block_k=8),
}


@pytest.mark.parametrize("attention", ["grouped", "latent"])
@pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS.keys())
def test_gradients_of_inputs_and_of_weights_may_be_asked_for_apart(attention: str, select: Select) -> None:
    """As a pipeline does that puts off the gradients of weights: the same bits as of one call."""
    made = module(config(ATTENTIONS[attention], select), torch.float32)
    x, weights = hidden(100, dtype=torch.float32).requires_grad_(), list(made.parameters())
    loss = made(x)[0].square().sum()
    of_input = torch.autograd.grad(loss, [x], retain_graph=True)
    of_weights = torch.autograd.grad(loss, weights, retain_graph=True)
    together = torch.autograd.grad(loss, [x, *weights])
    assert all(torch.equal(one, two) for one, two in zip((*of_input, *of_weights), together, strict=True))


@by_cpu
@pytest.mark.parametrize("apart", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
def test_gradients_of_some_of_the_operands_are_those_of_all(implementation: str, apart: list[int]) -> None:
    shape = (2, 4, 2, 2, 150, 150, 16, 16, 16, 16)
    leaves = draw(shape)
    out = attend(*leaves, blocks(*leaves[:2], Blocks(k=4, block_q=16, block_k=16)), implementation=implementation)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    some = torch.autograd.grad(out, [leaves[i] for i in apart], pull, retain_graph=True)
    every = torch.autograd.grad(out, leaves, pull)
    assert all(torch.equal(one, every[i]) for one, i in zip(some, apart, strict=True))
    frozen = [x if i in apart else x.detach() for i, x in enumerate(leaves)]
    selection = blocks(*leaves[:2], Blocks(k=4, block_q=16, block_k=16))
    of_frozen = torch.autograd.grad(
        attend(*frozen, selection, implementation=implementation), [leaves[i] for i in apart], pull
    )
    assert all(torch.equal(one, two) for one, two in zip(of_frozen, some, strict=True))


CHOICES: dict[str, Blocks] = {
    "flat": Blocks(k=4, block_q=32, block_k=16),
    "flat per token": Blocks(k=4, block_q=1, block_k=16, sharing="group"),
    "beam": Hierarchical(k=4, block_q=16, block_k=16, branching=2),
    "best_first": Hierarchical(k=5, block_q=16, block_k=16, branching=2, search="best_first", sharing="all"),
}


@by_cpu
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_packed_documents_attend_as_each_does_alone(implementation: str, choice: Blocks) -> None:
    """Forward and backward; documents of 160, 32, 352 and 57 tokens."""
    starts, total = (0, 160, 192, 544), 601
    leaves = draw((2, 4, 2, 0, total, total, 16, 24))
    select = hierarchical if isinstance(choice, Hierarchical) else blocks

    def alone(low: int, high: int) -> Tensor:
        q, k, v = (x[:, :, low:high] for x in leaves)
        return attend(q, k, v, select(q, k, choice), implementation=implementation)

    selection = select(*leaves[:2], choice, documents=starts)
    packed = attend(*leaves, selection, implementation=implementation)
    looped = torch.cat([alone(low, high) for low, high in pairwise((*starts, total))], dim=2)
    part = torch.autograd.grad(packed[:, :, 192:544].sum(), leaves, retain_graph=True)
    assert all(bool((torch.cat((x[:, :, :192], x[:, :, 544:]), dim=2) == 0).all()) for x in part)
    # the same products; a sum of fp32 may be cut into other tiles
    close(packed, looped, 1e-6)
    for one, two in zip(grads(packed, leaves), grads(looped, leaves), strict=True):
        close(one, two, 3e-6)
