"""The router on numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from dsv3.config import MoE, vary
from dsv3.moe import route
from dsv3.moe.router import gate_weights, select

FOUR = MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def route_logits(logits: list[list[float]], moe: MoE, bias: list[float] | None = None) -> tuple[Tensor, Tensor]:
    """Indices in rising order and their weights, for tokens whose router logits are given."""
    wanted = torch.tensor(logits)
    experts = wanted.shape[1]
    routing = route(wanted, torch.eye(experts), torch.tensor(bias or [0.0] * experts), moe)
    indices, order = routing.indices.sort(dim=1)
    return indices, routing.weights.gather(1, order)


def test_sigmoid_weights_are_the_chosen_scores_over_their_sum_times_the_factor() -> None:
    moe = vary(FOUR, routed_scaling_factor=2.5)
    indices, weights = route_logits([[logit(0.9), logit(0.1), logit(0.6), logit(0.2)]], moe)
    assert indices.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[2.5 * 0.9 / 1.5, 2.5 * 0.6 / 1.5]]))


def test_softmax_weights_without_normalisation_are_the_probabilities_themselves() -> None:
    moe = vary(FOUR, scoring_func="softmax", norm_topk_prob=False)
    indices, weights = route_logits([[math.log(4), math.log(3), math.log(2), math.log(1)]], moe)
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]))


def test_bias_moves_the_choice_and_never_the_weights_of_what_is_chosen() -> None:
    scores = [[logit(0.9), logit(0.1), logit(0.6), logit(0.2)]]
    indices, weights = route_logits(scores, FOUR, bias=[0.0, 0.6, 0.0, 0.0])
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.9, 0.1]]))


def test_a_group_is_scored_by_its_two_best_experts() -> None:
    # The best single expert is in the first group; the best pair, 0.5 + 0.5 against 0.8 + 0.1, in the second.
    moe = vary(FOUR, n_group=2, topk_group=1)
    indices, _ = route_logits([[logit(0.8), logit(0.1), logit(0.5), logit(0.5)]], moe)
    assert indices.tolist() == [[2, 3]]


def test_experts_of_closed_groups_lose_against_negative_scores() -> None:
    # In the open group one biased score is negative; a closed group set to zero instead of -inf would take its place.
    moe = vary(FOUR, n_group=2, topk_group=1)
    indices, weights = route_logits(
        [[logit(0.9), logit(0.2), logit(0.3), logit(0.3)]], moe, bias=[0.0, -0.5, -0.3, -0.3]
    )
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.9 / 1.1, 0.2 / 1.1]]))


def test_counts_are_the_tokens_that_each_expert_was_asked_to_take() -> None:
    wanted = torch.tensor([[5.0, 4.0, 0.0, 0.0], [5.0, 0.0, 4.0, 0.0], [5.0, 4.0, 0.0, 0.0]])
    routing = route(wanted, torch.eye(4), torch.zeros(4), FOUR)
    assert routing.counts.tolist() == [3, 2, 1, 0]
    assert routing.kept is None


def test_logits_are_computed_in_float32_for_a_bfloat16_model_even_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    weight = torch.randn(4, 64, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = route(x, weight, torch.zeros(4), FOUR)
    torch.testing.assert_close(routing.scores, (x.float() @ weight.float().T).sigmoid())


@pytest.mark.parametrize("bad", ["x", "weight"])
def test_a_nan_is_refused_with_the_token_that_has_it(bad: str) -> None:
    x, weight = torch.ones(3, 4), torch.eye(4)
    if bad == "x":
        x[1, 2] = torch.nan
    else:
        weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"scores of token {1 if bad == 'x' else 0}=nan"):
        route(x, weight, torch.zeros(4), FOUR)


def test_infinite_logits_are_right_under_sigmoid_and_refused_under_softmax() -> None:
    indices, weights = route_logits([[100.0, 1e38, -1e38, -1e38]], FOUR)
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5]]))
    infinite = torch.tensor([[torch.inf, 1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="nor infinite under softmax"):
        route(infinite, torch.eye(4).where(torch.eye(4) == 1, 0.0), torch.zeros(4), vary(FOUR, scoring_func="softmax"))


def test_weights_and_gradients_stay_finite_when_every_chosen_score_is_zero() -> None:
    logits = torch.full((1, 4), -200.0, requires_grad=True)
    weights = gate_weights(logits.sigmoid(), torch.tensor([[0, 1]]), FOUR)
    assert weights.tolist() == [[0.0, 0.0]]
    assert torch.autograd.grad(weights.sum(), logits)[0].tolist() == [[0.0] * 4]


def test_with_one_group_the_choice_is_the_plain_top_k() -> None:
    biased = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    moe = MoE(n_routed_experts=12, num_experts_per_tok=5, moe_intermediate_size=8)
    chosen = select(biased, moe).sort(dim=1).values
    assert torch.equal(chosen, biased.argsort(dim=1, descending=True)[:, :5].sort(dim=1).values)
