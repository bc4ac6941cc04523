"""Capacity: how much an expert takes, which tokens it drops or sends on, and what it learns from the past."""

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import Adaptive, Dropless, Fixed, MoE, SignBias, vary
from dsv3.config.moe import Policy
from dsv3.model import Transformer, hf
from dsv3.moe import MoELayer, Routing, expert_capacity, route
from dsv3.moe.capacity import adaptive_capacity, averaged, drop
from dsv3.moe.router import gate_weights, within_groups
from dsv3.moe.routing import count
from tests.model.variants import BASE
from tests.moe import slow_capacity
from tests.moe.layers import layer_of
from tests.moe.test_properties import routed

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


@settings(max_examples=60)
@given(routed(), st.floats(0.05, 3.0), st.sampled_from(get_args(Policy)))
def test_every_policy_keeps_what_the_slow_truth_keeps(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor], factor: float, policy: Policy
) -> None:
    moe, x, weight, bias = given
    routing = route(x, weight, bias, moe)
    most = expert_capacity(len(x), moe, factor)
    match policy:
        case "position":
            expected = slow_capacity.by_position(routing, most)
        case "probability":
            expected = slow_capacity.by_probability(routing, most)
        case "reroute":
            biased = within_groups(routing.scores + bias, moe).tolist()
            expected = slow_capacity.by_reroute(routing, moe, most, biased)
    found = drop(routing, moe, Fixed(factor=factor, policy=policy), bias=bias)
    assert slow_capacity.kept_pairs(found) == expected


@settings(max_examples=60)
@given(routed(), st.floats(0.05, 3.0), st.sampled_from(get_args(Policy)))
def test_no_expert_has_more_than_its_capacity_and_no_token_an_expert_twice(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor], factor: float, policy: Policy
) -> None:
    moe, x, weight, bias = given
    routing = route(x, weight, bias, moe)
    found = drop(routing, moe, Fixed(factor=factor, policy=policy), bias=bias)
    assert found.kept is not None
    assert count(found.indices[found.kept], moe.n_routed_experts).max() <= expert_capacity(len(x), moe, factor)
    assert all(len(set(row)) == moe.num_experts_per_tok for row in found.indices.tolist())
    assert torch.equal(found.counts, routing.counts), "counted before dropping"
    torch.testing.assert_close(found.weights, gate_weights(found.scores, found.indices, moe))


@settings(max_examples=30)
@given(routed(), st.sampled_from(get_args(Policy)))
def test_a_capacity_of_all_tokens_drops_and_moves_nothing(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor], policy: Policy
) -> None:
    moe, x, weight, bias = given
    routing = route(x, weight, bias, moe)
    found = drop(routing, moe, Fixed(factor=1e6, policy=policy), bias=bias)
    assert found.kept is not None
    assert found.kept.all()
    assert torch.equal(found.indices.sort().values, routing.indices.sort().values)


@settings(max_examples=30)
@given(routed(), st.floats(0.05, 2.0))
def test_rerouting_keeps_what_dropping_by_probability_keeps_and_more(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor], factor: float
) -> None:
    moe, x, weight, bias = given
    routing = route(x, weight, bias, moe)
    dropped, sent_on = (
        slow_capacity.kept_pairs(drop(routing, moe, Fixed(factor=factor, policy=policy), bias=bias))
        for policy in ("probability", "reroute")
    )
    assert dropped <= sent_on


def test_rerouting_by_hand() -> None:
    """Four tokens want expert 0 of three, which has room for two. Token 3 wants it least, then token 1; both prefer
    expert 1, which has one place left beside token 4, and takes the one that scores it higher: token 3.
    """
    moe = MoE(n_routed_experts=3, num_experts_per_tok=1, moe_intermediate_size=8, norm_topk_prob=False)
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.7, 0.3, 0.1], [0.8, 0.2, 0.1], [0.6, 0.5, 0.4], [0.1, 0.9, 0.2]])
    indices = torch.tensor([[0], [0], [0], [0], [1]])
    routing = Routing(indices, scores.gather(1, indices), scores, count(indices, 3))
    found = drop(routing, moe, Fixed(factor=1.0, policy="reroute"))
    assert found.kept is not None
    assert found.kept.all()
    assert found.indices.flatten().tolist() == [0, 2, 0, 1, 1]
    torch.testing.assert_close(found.weights.flatten(), torch.tensor([0.9, 0.1, 0.8, 0.5, 0.9]))


def test_the_next_best_expert_is_the_biased_one_and_its_weight_has_no_bias() -> None:
    moe = MoE(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=8, norm_topk_prob=False)
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.1], [0.8, 0.5, 0.4, 0.1]])
    indices = torch.tensor([[0], [0]])
    routing = Routing(indices, scores.gather(1, indices), scores, count(indices, 4))
    bias = torch.tensor([0.0, 0.0, 0.3, 0.0])
    found = drop(routing, moe, Fixed(factor=1.0, policy="reroute"), bias=bias)
    assert found.indices.flatten().tolist() == [0, 2]
    torch.testing.assert_close(found.weights.flatten(), torch.tensor([0.9, 0.4]))


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("tokens, k", [(0, 2), (1, 2), (7, 2), (7, 8)])
def test_odd_batches_are_served(policy: Policy, tokens: int, k: int) -> None:
    """No tokens, fewer than experts, and every expert for every token: factor 1 then has room for all."""
    layer = layer_of(vary(EIGHT, num_experts_per_tok=k, capacity=Fixed(factor=1.0, policy=policy)), bias=0.1)
    y, routing = layer(torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(0)))
    assert y.shape == (1, tokens, 16)
    assert y.isfinite().all()
    assert routing.kept is not None
    assert k < 8 or routing.kept.all()


@pytest.mark.parametrize("policy", get_args(Policy))
def test_when_all_tokens_go_to_one_expert_it_takes_its_share(policy: Policy) -> None:
    """Eight tokens and eight experts, one place each: dropped are seven, or none where they are sent on."""
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    scores[:, 3] = 1.0
    indices = torch.full((8, 1), 3)
    moe = vary(EIGHT, num_experts_per_tok=1)
    routing = Routing(indices, scores.gather(1, indices), scores, count(indices, 8))
    found = drop(routing, moe, Fixed(factor=1.0, policy=policy))
    assert found.kept is not None
    assert found.kept.sum() == (8 if policy == "reroute" else 1)
    assert found.counts.tolist() == [0, 0, 0, 8, 0, 0, 0, 0]


@pytest.mark.parametrize("capacity", [Fixed(factor=1.0, policy=policy) for policy in get_args(Policy)], ids=repr)
def test_a_nan_is_refused_before_any_capacity(capacity: Fixed) -> None:
    layer = layer_of(vary(EIGHT, capacity=capacity))
    x = torch.randn(1, 6, 16)
    x[0, 2, 0] = math.nan
    with pytest.raises(ValueError, match="scores of token 2=nan"):
        layer(x)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_full_experts_do_not_freeze_the_bias(policy: Policy) -> None:
    """Filled up to the capacity every expert has as many tokens as all others, and the sign of no error moves nothing.
    The loads that a bias is moved by are those that were asked for.
    """
    layer = layer_of(vary(EIGHT, capacity=Fixed(factor=0.25, policy=policy), balance=(SignBias(rate=1.0),)))
    _, routing = layer(torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(0)))
    assert routing.kept is not None
    taken = count(routing.indices[routing.kept], 8)
    assert taken.unique().tolist() == [8], "all full"
    layer.update_bias(routing.counts)
    assert layer.gate.e_score_correction_bias.abs().sum() > 0


ADAPTIVE = vary(EIGHT, capacity=Adaptive(momentum=0.5))


def test_the_average_by_hand_and_by_a_loop() -> None:
    infinite = torch.tensor(math.inf)
    first = averaged(infinite, torch.tensor([6, 2, 4, 4]), 0.5)
    assert first.item() == 1.5, "the first step is taken as it is"
    assert averaged(first, torch.tensor([8, 0, 4, 4]), 0.5).item() == 1.75
    assert averaged(first, torch.zeros(4, dtype=torch.int64), 0.5).item() == 1.5, "a step without tokens says nothing"
    assert averaged(first, 7 * torch.tensor([8, 0, 4, 4]), 0.5).item() == 1.75, "units do not matter"
    generator = torch.Generator().manual_seed(0)
    average, slow = infinite, None
    for _ in range(20):
        counts = torch.randint(1, 50, (8,), generator=generator)
        largest = max(counts.tolist()) / (sum(counts.tolist()) / 8)
        slow = largest if slow is None else 0.9 * slow + 0.1 * largest
        average = averaged(average, counts, 0.9)
        assert average.item() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 7, 60])
def test_before_the_first_step_an_adaptive_capacity_is_the_whole_batch(tokens: int) -> None:
    assert adaptive_capacity(tokens, ADAPTIVE, torch.tensor(math.inf)).item() == tokens


def test_an_adaptive_capacity_drops_by_the_past_alone() -> None:
    layer = layer_of(ADAPTIVE)
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(1, 64, 16, generator=generator)
    skewed = torch.randn(1, 1, 16, generator=generator).repeat(1, 64, 1)
    routing = layer(skewed)[1]
    assert routing.kept is not None
    assert routing.kept.all(), "without a past nothing is dropped"
    layer.update_capacity(layer(even)[1].counts)
    loads = layer(even)[1].counts
    most = loads.max().item()
    assert layer.largest_load is not None
    assert layer.largest_load.item() == pytest.approx(most / 16)
    routing = layer(skewed)[1]
    assert routing.kept is not None
    assert count(routing.indices[routing.kept], 8).max() == most, "as much as the busiest took before"
    layer.update_capacity(routing.counts)
    assert layer.largest_load.item() == pytest.approx((most / 16 + 4) / 2), "64 tokens at an expert, counted undropped"


def test_the_average_has_no_gradient_and_survives_a_checkpoint_and_a_cast() -> None:
    layer = layer_of(ADAPTIVE)
    layer.update_capacity(torch.tensor([5, 1, 1, 1, 1, 1, 1, 1]))
    assert layer.largest_load is not None
    assert not layer.largest_load.requires_grad
    other = layer_of(ADAPTIVE, seed=1)
    other.load_state_dict(layer.state_dict())
    other = other.bfloat16()
    assert other.largest_load is not None
    assert other.largest_load.dtype == torch.float32
    assert torch.equal(other.largest_load, layer.largest_load)


def test_the_average_is_stored_for_other_programs_and_does_not_widen_the_weights(tmp_path: Path) -> None:
    model = Transformer(vary(BASE, **{"moe.capacity": Adaptive()}), seed=3).bfloat16()
    averages = [module.largest_load for module in model.modules() if isinstance(module, MoELayer)]
    for at, average in enumerate(averages):
        average.fill_(1.25 + at)
    hf.save(model, tmp_path)
    found = hf.load(tmp_path)
    assert found.embed_tokens.weight.dtype == torch.bfloat16
    assert [module.largest_load for module in found.modules() if isinstance(module, MoELayer)] == averages


def test_layers_without_an_average_have_no_such_state_and_do_not_move() -> None:
    layer = layer_of(EIGHT)
    layer.update_capacity(torch.ones(8, dtype=torch.int64))
    assert "largest_load" not in layer.state_dict()


def test_an_adaptive_capacity_is_for_training_only() -> None:
    layer = layer_of(ADAPTIVE)
    layer.update_capacity(torch.ones(8, dtype=torch.int64))
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    assert layer(x)[1].kept is not None
    assert layer.eval()(x)[1].kept is None


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.inf, math.nan])
def test_momenta_that_cannot_be_are_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum="):
        Adaptive(momentum=momentum)


def test_an_unknown_policy_is_refused() -> None:
    for make in (lambda: Fixed(factor=1.0, policy="none"), lambda: Adaptive(policy="none")):
        with pytest.raises(ValueError, match="policy='none': must be one of probability, position, reroute"):
            make()


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
