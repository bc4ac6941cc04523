"""Capacity: how much an expert takes, which tokens it drops, and what that lets tokens see of each other."""

import pytest
import torch

from dsv3.config import Dropless, Fixed, MoE, SignBias, vary
from dsv3.moe import Routing, expert_capacity
from dsv3.moe.capacity import drop
from dsv3.moe.routing import count
from tests.moe.layers import layer_of

EIGHT = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, capacity=Fixed(factor=1.0))


def to_one_expert(weights: list[float]) -> Routing:
    """Tokens that all go to the first of two experts, with these weights."""
    indices = torch.zeros(len(weights), 1, dtype=torch.int64)
    return Routing(indices, torch.tensor(weights)[:, None], torch.rand(len(weights), 2), count(indices, 2))


@pytest.mark.parametrize(
    "tokens, experts, k, factor, capacity",
    [
        (10, 4, 2, 1.2, 6),  # 5 * 1.2 exactly
        (40, 4, 2, 1.1, 22),  # 20 * 1.1, which binary floating point makes a little more than 22
        (10, 4, 1, 1.0, 3),  # 2.5 rounded up
        (3, 8, 1, 1.0, 1),  # at least one
        (5, 4, 2, 2.0, 5),  # 5 of 5: never more than there are tokens
        (5, 4, 2, 100.0, 5),
    ],
)
def test_capacity_by_hand(tokens: int, experts: int, k: int, factor: float, capacity: int) -> None:
    moe = MoE(n_routed_experts=experts, num_experts_per_tok=k, moe_intermediate_size=8)
    assert expert_capacity(tokens, moe, factor) == capacity


def test_dynamic_capacity_of_mean_load_is_a_fixed_one() -> None:
    """However a router spreads the tokens, 1.2 x the mean of its loads is 1.2 x N K / E."""
    generator = torch.Generator().manual_seed(0)
    for skew in (0.0, 1.0, 10.0):
        scores = torch.rand(100, 8, generator=generator) + skew * torch.arange(8)
        loads = count(scores.topk(2).indices, 8)
        assert -(-1.2 * loads.double().mean().item() // 1) == expert_capacity(100, EIGHT, 1.2)


def test_by_probability_the_least_probable_is_dropped() -> None:
    moe = MoE(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    kept = drop(to_one_expert([0.5, 0.9, 0.1, 0.7]), moe, Fixed(factor=1.0, policy="probability")).kept
    assert kept is not None
    assert kept.flatten().tolist() == [False, True, False, True]


def test_by_position_the_last_in_the_batch_is_dropped() -> None:
    moe = MoE(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    kept = drop(to_one_expert([0.5, 0.9, 0.1, 0.7]), moe, Fixed(factor=1.0, policy="position")).kept
    assert kept is not None
    assert kept.flatten().tolist() == [True, True, False, False]


def test_equal_probabilities_are_dropped_by_position() -> None:
    moe = MoE(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    kept = drop(to_one_expert([0.5] * 6), moe, Fixed(factor=1.0)).kept
    assert kept is not None
    assert kept.flatten().tolist() == [True] * 3 + [False] * 3


def test_counts_are_those_before_dropping_so_that_the_bias_sees_the_overload() -> None:
    layer = layer_of(vary(EIGHT, capacity=Fixed(factor=0.5), balance=(SignBias(rate=1.0),)))
    _, routing = layer(torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0)))
    assert routing.kept is not None
    taken = count(routing.indices[routing.kept], 8)
    assert routing.counts.sum() == 120
    assert taken.max() <= 8 < routing.counts.max()
    layer.update_bias(routing.counts)
    assert layer.gate.e_score_correction_bias.abs().max() == 1.0


def test_inference_is_dropless_whatever_the_capacity() -> None:
    layer = layer_of(vary(EIGHT, capacity=Fixed(factor=0.25)))
    dropless = layer_of(vary(EIGHT, capacity=Dropless()))
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    y, routing = layer.eval()(x)
    assert routing.kept is None
    assert torch.equal(y, dropless(x)[0])
    assert not torch.equal(layer.train()(x)[0], y)


def outputs_of_earlier_tokens(policy: str) -> list[torch.Tensor]:
    """What the first tokens of a training batch put out, for two batches that differ only in their last token."""
    layer = layer_of(vary(EIGHT, capacity=Fixed(factor=0.5, policy=policy), n_shared_experts=0))
    x = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(0))
    # A copy of the first token, more extreme: it wants the same experts, and wants them more.
    other = x.clone()
    other[0, -1] = 4 * x[0, 0]
    return [layer(batch)[0][0, :-1] for batch in (x, other)]


def test_dropping_by_probability_lets_a_later_token_change_an_earlier_output() -> None:
    before, after = outputs_of_earlier_tokens("probability")
    assert not torch.equal(before, after)


def test_dropping_by_position_lets_no_later_token_change_an_earlier_output() -> None:
    before, after = outputs_of_earlier_tokens("position")
    torch.testing.assert_close(before, after)
