"""Counted operations against the products written out."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from bench.meters.flops import flops, grouped_mm_flops
from dsv3.attention import attend, implementation
from dsv3.attention.select import blocks, window
from dsv3.config import Blocks
from dsv3.model import cost
from tests.attention.lists import needs_kernel

E, D, FF = 4, 48, 32
ROWS = (63, 1, 0, 60)


def test_a_matrix_product_and_its_backward() -> None:
    a, b = torch.randn(63, 100, requires_grad=True), torch.randn(100, 60, requires_grad=True)
    one = 2 * 63 * 100 * 60
    assert flops(lambda: a @ b).value == one
    assert flops(lambda: (a @ b).sum().backward()).value == 3 * one


def test_element_wise_work_counts_nothing() -> None:
    assert flops(lambda: torch.ones(100).exp().sum()).value == 0


def test_grouped_mm_costs_what_the_loop_over_experts_costs() -> None:
    n = sum(ROWS)
    x = torch.randn(n, D, requires_grad=True)
    w = torch.randn(E, D, FF, requires_grad=True)
    gradient = torch.randn(n, FF)
    offsets = torch.tensor(ROWS).cumsum(0).to(torch.int32)

    def grouped() -> None:
        F.grouped_mm(x, w, offs=offsets).backward(gradient)

    def looped() -> None:
        torch.cat([part @ w[e] for e, part in enumerate(x.split(ROWS))]).backward(gradient)

    assert flops(grouped).value == flops(looped).value == 3 * 2 * n * D * FF


def test_batched_grouped_mm_counts_every_group() -> None:
    assert grouped_mm_flops([E, 3, D], [E, D, FF]) == 2 * E * 3 * D * FF


def test_attention_on_a_cpu_costs_what_its_two_products_cost() -> None:
    q, k, v = (torch.randn(2, 3, 60, width, requires_grad=True) for width in (16, 16, 16))
    one = 2 * 2 * 3 * 60 * 60 * 16
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)).value == 2 * one
    gradient = torch.randn(2, 3, 60, 16)
    whole = flops(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient))
    assert whole.value == 7 * one


@needs_kernel
@pytest.mark.parametrize("sharing", ["head", "group", "all"])
@pytest.mark.parametrize("queries", [300, 77, 1])
def test_the_kernel_of_attention_costs_what_the_pairs_of_its_lists_cost(sharing: str, queries: int) -> None:
    """As `dsv3.model.cost` has it: 2 (P + R) per pair forward, the scores again and four products backward."""
    choice = Blocks(k=4, block_q=1, block_k=32, sharing=sharing)
    q, k, v = (torch.randn(2, n, 300, w, requires_grad=True) for n, w in ((4, 16), (2, 16), (2, 24)))
    selection = blocks(q, k, choice)
    part = replace(selection, indices=selection.indices[:, :, -queries:], counts=selection.counts[:, :, -queries:])
    pairs = 2 * 4 * (cost.kept_pairs(choice, 300) - cost.kept_pairs(choice, 300 - queries))
    q = q[:, :, -queries:]
    assert implementation(q, part) == "kernel"
    assert flops(lambda: attend(q, k, v, part)).value == 2 * pairs * (16 + 24)
    both = flops(lambda: attend(q, k, v, part).sum().backward()).value
    assert both == 2 * pairs * (16 + 24) + 2 * pairs * (3 * 16 + 2 * 24)


@needs_kernel
def test_the_kernel_counts_a_rule_per_token_and_no_selection_by_their_pairs() -> None:
    q, k, v = (torch.randn(2, n, 300, 16) for n in (4, 2, 2))
    chosen = window(2, 300, 300, size=50, sink=3)
    ours = flops(lambda: attend(q, k, v, chosen, implementation="kernel")).value
    assert ours == 2 * 4 * chosen.cost.kept * (16 + 16)
    dense = flops(lambda: attend(q[:, :, 200:], k, v, implementation="kernel")).value
    assert dense == 2 * 2 * 4 * sum(range(201, 301)) * (16 + 16)


@needs_kernel
def test_the_kernel_is_counted_in_the_call_that_loads_it() -> None:
    code = (
        "import torch; from bench.meters.flops import flops; from dsv3.attention import attend\n"
        "q = torch.zeros(1, 1, 4, 16); print(flops(lambda: attend(q, q, q, implementation='kernel')).value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 10 * 32


def test_a_formula_of_ones_own_is_used() -> None:
    assert flops(lambda: torch.ones(3).exp(), more={torch.ops.aten.exp: lambda *_, **__: 17}).value == 17
