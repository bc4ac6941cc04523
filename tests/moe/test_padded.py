"""The padded batch: a capacity makes its shapes static, drops what is behind it and nothing else."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.config import Fixed, MoE
from dsv3.moe import Routing, expert_capacity
from dsv3.moe.capacity import drop
from dsv3.moe.dispatch import Dispatch, padded, reference, slots
from dsv3.moe.routing import count
from tests.moe.layers import random_routing, stacked_experts

HIDDEN, INNER = 6, 3


def results(dispatch: Dispatch, routing: Routing) -> list[Tensor]:
    """In float64: the output, and the gradients of x, of the gate weights and of the experts' weights."""
    x = torch.randn(len(routing.indices), HIDDEN, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    leaves = (x, routing.weights, *stacked_experts(len(routing.counts), HIDDEN, INNER, torch.float64))
    y = dispatch(x, routing, *leaves[2:])
    return [y, *torch.autograd.grad(y, leaves, y.detach().cos())]


def equal(dispatch: Dispatch, routing: Routing, truth: Routing | None = None) -> None:
    for one, other in zip(results(dispatch, routing), results(reference, truth or routing), strict=True):
        # sums of at most a hundred products of about 1 in another order; eps is 2e-16
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-13)


def fixed(routing: Routing, factor: float, policy: str = "position") -> tuple[Routing, int]:
    """The routing after `drop`, and its capacity."""
    k, experts = routing.indices.shape[1], len(routing.counts)
    capacity = Fixed(factor=factor, policy=policy)
    moe = MoE(n_routed_experts=experts, num_experts_per_tok=k, moe_intermediate_size=INNER, capacity=capacity)
    return drop(routing, moe, capacity), expert_capacity(len(routing.indices), moe, factor)


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25, 8.0])
@pytest.mark.parametrize("tokens, experts, k", [(40, 8, 2), (1, 5, 3), (0, 4, 2), (9, 4, 4), (12, 1, 1)])
def test_after_dropping_the_capacity_holds_every_pair(
    tokens: int, experts: int, k: int, factor: float, policy: str
) -> None:
    routing, capacity = fixed(random_routing(tokens, experts, k, torch.float64), factor, policy)
    equal(partial(padded, capacity=capacity), routing)
    equal(padded, routing)


@given(st.integers(0, 30), st.integers(1, 7), st.integers(0, 2**31), st.integers(0, 40), st.floats(0.0, 1.0))
@settings(max_examples=40)
def test_any_capacity_drops_the_last_in_the_batch(
    tokens: int, experts: int, seed: int, capacity: int, kept: float
) -> None:
    routing = random_routing(tokens, experts, seed % experts + 1, torch.float64, seed, kept)
    taken = torch.ones_like(routing.indices, dtype=torch.bool) if routing.kept is None else routing.kept
    before = torch.zeros(experts, dtype=torch.long)
    for pair, expert in enumerate(routing.indices.flatten().tolist()):
        before[expert] += int(taken.flatten()[pair])
        taken.flatten()[pair] &= before[expert] <= capacity
    equal(partial(padded, capacity=capacity), routing, replace(routing, kept=taken))


def test_without_a_capacity_all_experts_get_the_rows_of_the_fullest() -> None:
    indices = torch.tensor([[0, 2], [2, 0], [2, 1]])
    routing = Routing(indices, torch.ones(3, 2).double().requires_grad_(), torch.ones(3, 4), count(indices, 4))
    slot, capacity = slots(routing, None)
    assert (slot.tolist(), capacity) == ([[0, 6], [7, 1], [8, 3]], 3)
    equal(padded, routing)
    dropped = replace(routing, kept=torch.tensor([[True, False], [True, True], [True, True]]))
    assert slots(dropped, None)[0].tolist() == [[0, 8], [4, 1], [5, 2]]


def test_all_tokens_to_one_expert() -> None:
    indices = torch.full((9, 1), 2)
    routing = Routing(indices, torch.ones(9, 1).double().requires_grad_(), torch.ones(9, 4), count(indices, 4))
    equal(padded, routing)
    equal(partial(padded, capacity=9), routing)


def test_an_empty_row_passes_no_infinity_on() -> None:
    """A row that stood for some token would turn that token's infinity into NaN."""
    routing = random_routing(5, 4, 2, torch.float32)
    x = torch.ones(5, HIDDEN)
    x[0] = float("inf")
    gate_up, down = stacked_experts(4, HIDDEN, INNER, torch.float32)
    y = padded(x, routing, gate_up, down, capacity=5)
    gradients = torch.autograd.grad(y[1:].sum(), (gate_up, down))
    assert y[1:].isfinite().all()
    untouched = [expert for expert in range(4) if expert not in routing.indices[0].tolist()]
    assert all(gradient[untouched].isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("annotations_unchecked")
def test_one_graph_serves_every_routing() -> None:
    """Nothing in it depends on the data: neither a break nor a second compilation."""
    graphs = list[torch.fx.GraphModule]()

    def kept(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(partial(padded, capacity=6), fullgraph=True, backend=kept)
    for seed in (0, 1):
        routing = random_routing(13, 5, 2, torch.float64, seed)
        equal(compiled, routing, fixed(routing, 6 / 5.2)[0])
    assert len(graphs) == 1


def test_a_capacity_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"capacity=-1: must be at least 0; dsv3\.moe\.capacity"):
        slots(random_routing(3, 2, 1, torch.float32), -1)
