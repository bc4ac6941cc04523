"""Experts that choose tokens: even whatever the scores, right where every pair is chosen, and only in training."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.meters.load import load
from dsv3.config import ExpertChoice, Fixed, MoE, SwitchLoss, ZLoss
from dsv3.moe import Routing
from dsv3.moe.dispatch import reference
from dsv3.moe.expert_choice import choose_tokens
from dsv3.moe.routing import count
from tests.moe.layers import layer_of

MOE = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, balance=(ExpertChoice(),))


def scored(scores: torch.Tensor, k: int) -> Routing:
    weights, indices = scores.topk(k)
    return Routing(indices, weights, scores, count(indices, scores.shape[1]))


def test_two_experts_share_four_tokens_by_hand() -> None:
    """Both want the first token most; the last is wanted by neither, and has no weight."""
    scores = torch.tensor([[0.9, 0.8], [0.6, 0.1], [0.2, 0.7], [0.1, 0.0]])
    found = choose_tokens(scored(scores, 1), replace(MOE, n_routed_experts=2, num_experts_per_tok=1))
    assert found.kept is not None
    assert found.kept.tolist() == [[True, True], [True, False], [False, True], [False, False]]
    assert found.counts.tolist() == [2, 2]
    torch.testing.assert_close(found.weights, torch.tensor([[9 / 17, 8 / 17], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=30)
def test_loads_differ_by_one_at_most_and_each_expert_has_the_tokens_it_wants_most(
    seed: int, tokens: int, experts: int
) -> None:
    k = seed % experts + 1
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) * torch.linspace(
        0.1, 1, experts
    )
    found = choose_tokens(scored(scores, k), replace(MOE, n_routed_experts=experts, num_experts_per_tok=k))
    assert found.kept is not None
    assert torch.equal(found.kept.sum(dim=0), found.counts)
    assert found.counts.sum() == tokens * k
    assert found.counts.max() - found.counts.min() <= 1
    assert not found.weights[~found.kept].any()
    wanted, left = scores.where(found.kept, 2.0).amin(dim=0), scores.where(~found.kept, -1.0).amax(dim=0)
    assert (wanted >= left).all()


def test_of_no_token_experts_choose_none() -> None:
    found = choose_tokens(scored(torch.zeros(0, 8), 2), MOE)
    assert found.kept is not None
    assert (found.indices.shape, found.weights.shape, found.kept.shape) == ((0, 8), (0, 8), (0, 8))
    assert found.counts.tolist() == [0] * 8


def test_where_each_token_has_every_expert_it_does_not_matter_who_chooses() -> None:
    all_of_them = replace(MOE, num_experts_per_tok=8)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    chosen, plain = (layer_of(moe)(x)[0] for moe in (all_of_them, replace(all_of_them, balance=())))
    # sums of 8 experts in another order, on outputs of about 1
    torch.testing.assert_close(chosen, plain, rtol=1e-5, atol=1e-5)


def test_the_layer_adds_up_what_the_chosen_pairs_give() -> None:
    layer = layer_of(replace(MOE, n_shared_experts=0))
    x = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(1))
    y, routing = layer(x)
    slow = reference(x[0], routing, layer.experts.gate_up, layer.experts.down)
    torch.testing.assert_close(y[0], slow, rtol=1e-5, atol=1e-5)
    assert not y[0][~routing.kept.any(dim=1)].any()
    y.square().sum().backward()
    assert layer.gate.weight.grad.isfinite().all()
    figures = {measured.metric: measured.value for measured in load(routing, layer.moe)}
    assert (figures["drop_share"], figures["dead_experts"]) == (0.0, 0)
    assert figures["max_vio"] <= 8 / 60  # 7 or 8 tokens where the mean is 7.5


def test_at_inference_tokens_choose() -> None:
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))
    y, routing = layer_of(MOE).eval()(x)
    assert routing.indices.shape == (18, 2)
    assert routing.kept is None
    assert torch.equal(y, layer_of(replace(MOE, balance=())).eval()(x)[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"balance": (ExpertChoice(), SwitchLoss())}, "has no load for another method to balance"),
        ({"n_group": 2, "topk_group": 2}, "n_group=2: must be 1 with ExpertChoice"),
        ({"capacity": Fixed(factor=1.2)}, "must be Dropless with ExpertChoice"),
    ],
)
def test_what_experts_that_choose_cannot_have_is_refused(changes: dict[str, object], message: str) -> None:
    assert replace(MOE, balance=(ExpertChoice(), ZLoss()))
    with pytest.raises(ValueError, match=message):
        replace(MOE, **changes)  # type: ignore[arg-type]
