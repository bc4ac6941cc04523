"""Counted operations against the products written out."""

import torch
from torch.nn import functional as F

from bench.meters.flops import flops, grouped_mm_flops

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


def test_a_formula_of_ones_own_is_used() -> None:
    assert flops(lambda: torch.ones(3).exp(), more={torch.ops.aten.exp: lambda *_, **__: 17}).value == 17
