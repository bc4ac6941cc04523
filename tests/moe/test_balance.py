"""Balance losses and the bias update on numbers worked by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.config import MoE, QuadraticLoss, SequenceLoss, SignBias, SimilarityLoss, SwitchLoss
from dsv3.moe import (
    Routing,
    balance_losses,
    quadratic_loss,
    route,
    sequence_loss,
    sign_bias,
    similarity_loss,
    switch_loss,
)
from dsv3.moe.balance import probabilities
from dsv3.moe.router import NORMALISATION_FLOOR
from dsv3.moe.routing import count


def routing(scores: list[list[float]], indices: list[list[int]]) -> Routing:
    chosen = torch.tensor(indices)
    score_NE = torch.tensor(scores, requires_grad=True)
    return Routing(chosen, score_NE.gather(1, chosen), score_NE, count(chosen, score_NE.shape[1]))


def test_sequence_loss_of_two_sequences_by_hand() -> None:
    # E = 2, K = 1, T = 2. First sequence: both tokens prefer expert 0, so f = (2, 0) and P = (0.7, 0.3), 1.4 together.
    # Second: one each, f = (1, 1), so its sum is 1 whatever P is. Mean of 1.4 and 1.
    found = routing([[0.8, 0.2], [0.3, 0.2], [0.9, 0.1], [0.2, 0.8]], [[0], [0], [0], [1]])
    assert sequence_loss(found, batch=2).item() == pytest.approx(1.2)


def test_sequence_loss_normalises_scores_over_the_experts() -> None:
    scaled = routing([[0.4, 0.1], [0.15, 0.1]], [[0], [0]])
    assert sequence_loss(scaled, batch=1).item() == pytest.approx(2 * 0.7)


def test_sequence_loss_takes_the_top_k_of_the_scores_not_of_what_a_bias_chose() -> None:
    scores = [[0.8, 0.2], [0.6, 0.4]]
    by_bias = routing(scores, [[1], [1]])
    assert sequence_loss(by_bias, batch=1).item() == sequence_loss(routing(scores, [[0], [0]]), batch=1).item()


def test_sequence_loss_of_a_batch_is_the_mean_over_its_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 5, 8, generator=generator)

    def loss_of(part: Tensor) -> Tensor:
        weights, indices = part.topk(2)
        return sequence_loss(Routing(indices, weights, part, count(indices, 8)), batch=len(part) // 5)

    whole, *parts = map(loss_of, (scores.flatten(0, 1), *scores))
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_switch_loss_by_hand() -> None:
    # f = (3/4, 1/4), P = (0.55, 0.45): 2 * (0.75 * 0.55 + 0.25 * 0.45) = 1.05.
    found = routing([[0.8, 0.2], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]], [[0], [0], [0], [1]])
    assert switch_loss(found).item() == pytest.approx(1.05)


def test_quadratic_loss_by_hand() -> None:
    # P = (0.7, 0.3): 2 * 0.2^2.
    found = routing([[0.8, 0.2], [0.6, 0.4]], [[0], [0]])
    assert quadratic_loss(found).item() == pytest.approx(0.08)


def test_quadratic_loss_is_blind_to_loads() -> None:
    # Every token sends 51% to expert 0 or to expert 1 in turn; the choices given here are all expert 0.
    scores = [[0.51, 0.49], [0.49, 0.51]] * 4
    assert quadratic_loss(routing(scores, [[0]] * 8)).item() == pytest.approx(0.0, abs=1e-12)
    assert switch_loss(routing(scores, [[0]] * 8)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("loss", [lambda r: sequence_loss(r, 1), switch_loss])
def test_losses_on_loads_are_one_at_perfect_balance(loss: object) -> None:
    even = routing(
        [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]], [[0], [1], [2], [3]]
    )
    assert loss(even).item() == pytest.approx(1.0)  # type: ignore[operator]


def test_losses_push_probability_away_from_the_busy_expert() -> None:
    for loss in (lambda r: sequence_loss(r, 1), switch_loss, quadratic_loss):
        found = routing([[0.8, 0.2], [0.6, 0.4]], [[0], [0]])
        loss(found).backward()
        assert found.scores.grad is not None
        assert (found.scores.grad[:, 0] > 0).all()
        assert (found.scores.grad[:, 1] < 0).all()


def test_tokens_of_no_sequence_are_refused() -> None:
    with pytest.raises(AssertionError, match="1 tokens do not make 0 sequences"):
        sequence_loss(routing([[0.8, 0.2]], [[0]]), batch=0)


def test_a_process_without_tokens_takes_part_in_every_mean() -> None:
    """One that left out a mean would keep the others waiting for it. Its probabilities are those of no preference."""
    nothing = torch.zeros(0, 1, dtype=torch.int64)
    empty = Routing(nothing, torch.zeros(0, 1), torch.zeros(0, 2), count(nothing, 2))
    shared: list[list[list[float]]] = []
    for part in (routing([[0.8, 0.2]], [[0]]), empty):
        seen: list[Tensor] = []
        for loss in (switch_loss, quadratic_loss):
            loss(part, lambda value, seen=seen: (seen.append(value), value)[1])
        shared.append([value.tolist() for value in seen])
    loads, means, again = shared[1]
    assert (len(shared[0]), loads, means, again) == (3, [0.0, 0.0], [0.5, 0.5], [0.5, 0.5])


def test_the_floor_under_a_sum_of_scores_changes_no_bit_of_ordinary_probabilities() -> None:
    logits = 8 * torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    scores = logits.sigmoid().requires_grad_()
    chosen = scores.topk(2).indices
    found = probabilities(Routing(chosen, scores.gather(1, chosen), scores, count(chosen, 16)))
    plain = scores / scores.sum(dim=1, keepdim=True)
    assert torch.equal(found, plain)
    assert torch.equal(*(torch.autograd.grad(each, scores, logits)[0] for each in (found, plain)))


@pytest.mark.parametrize("loss", [lambda r: sequence_loss(r, 2), switch_loss, quadratic_loss])
def test_gradients_are_the_derivatives_where_scores_come_near_to_the_floor_and_where_they_vanish(loss: object) -> None:
    """Of tokens with ordinary scores, with a sum of about the floor, and of which every score is zero."""
    centre = torch.tensor([0.0, math.log(NORMALISATION_FLOOR), -1e3, 0.0], dtype=torch.float64)
    logits = centre[:, None] + torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = logits.topk(2).indices

    def of_logits(logits: Tensor) -> Tensor:
        scores = logits.sigmoid()
        return loss(Routing(chosen, scores.gather(1, chosen), scores, count(chosen, 6)))  # type: ignore[operator]

    assert torch.autograd.gradcheck(of_logits, logits.requires_grad_())
    (gradient,) = torch.autograd.grad(of_logits(logits), logits)
    assert gradient.any(dim=1).tolist() == [True, True, False, True]


def test_losses_come_by_name_with_their_alpha_and_the_bias_adds_none() -> None:
    moe = MoE(
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        balance=(SignBias(), SequenceLoss(alpha=0.5), SwitchLoss(alpha=0.1), QuadraticLoss(alpha=3.0)),
    )
    found = routing([[0.8, 0.2], [0.6, 0.4]], [[0], [0]])
    losses = balance_losses(found, moe, batch=1)
    assert {name: round(loss.item(), 6) for name, loss in losses.items()} == {
        "sequence": 0.7,
        "switch": 0.14,
        "quadratic": 0.24,
    }


def test_the_global_batch_loss_forgives_processes_that_are_even_only_together() -> None:
    """Two processes whose tokens all prefer one expert each. By themselves: 2 * 0.9. Together f = P = 1/2: 1."""
    ones, others = routing([[0.9, 0.1]] * 2, [[0]] * 2), routing([[0.1, 0.9]] * 2, [[1]] * 2)
    assert switch_loss(ones).item() == switch_loss(others).item() == pytest.approx(1.8)
    both = routing([[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2, [[0]] * 2 + [[1]] * 2)
    # over both processes a load or probability of one expert is what the other has of the other expert
    together = switch_loss(ones, lambda value: (value + value.flip(0)) / 2)
    assert together.item() == pytest.approx(switch_loss(both).item()) == pytest.approx(1.0)


def test_similarity_loss_by_hand() -> None:
    # W W^T = [[4, 2], [2, 2]] minus the identity: 3 + 2 + 2 + 1.
    found = routing([[0.5, 0.5]], [[0]])
    assert similarity_loss(replace(found, router=torch.tensor([[2.0, 0.0], [1.0, 1.0]]))).item() == 8.0
    orthogonal = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0))).Q.t()
    # 4 entries, each a sum of 6 products in float32
    assert similarity_loss(replace(found, router=orthogonal)).item() == pytest.approx(0.0, abs=4 * 6 * 6e-8)


def test_similarity_loss_makes_a_router_orthogonal_and_spreads_tokens_that_point_everywhere() -> None:
    moe = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, balance=(SimilarityLoss(alpha=1.0),))
    generator = torch.Generator().manual_seed(0)
    x, common = torch.randn(2048, 16, generator=generator), torch.randn(16, generator=generator)
    # rows near to one direction, of different lengths: half of all tokens want the same two experts
    weight = (torch.linspace(0.2, 2.0, 8)[:, None] * common + 0.1 * torch.randn(8, 16, generator=generator)) / 4
    weight.requires_grad_()
    losses, loads = [], []
    for rate in torch.linspace(0.05, 0.0, 300).tolist():
        found = route(x, weight, torch.zeros(8), moe)
        (loss,) = balance_losses(found, moe, batch=1).values()
        losses.append(loss.item())
        loads.append(found.counts)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.data -= rate * gradient
    assert losses[-1] < 0.05 * losses[0]
    first, last = (float(load.max() / load.double().mean()) - 1 for load in (loads[0], loads[-1]))
    assert last < 0.2 < 0.8 < first


def test_a_router_shows_its_weight_only_to_the_loss_that_wants_it() -> None:
    moe = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8)
    x, weight = torch.randn(3, 4), torch.randn(8, 4)
    assert route(x, weight, torch.zeros(8), moe).router is None
    shown = route(x, weight, torch.zeros(8), replace(moe, balance=(SimilarityLoss(),))).router
    assert shown is not None
    assert torch.equal(shown, weight)


def test_a_mean_over_processes_replaces_the_statistics_of_the_batch() -> None:
    """Two processes with half the tokens each and averaged statistics: losses and gradients of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(8, 4, generator=generator)
    indices = scores.topk(2).indices

    def loss_of(part: slice, mean: object) -> tuple[Tensor, Tensor]:
        score_NE = scores[part].clone().requires_grad_()
        chosen = indices[part]
        value = Routing(chosen, score_NE.gather(1, chosen), score_NE, count(chosen, 4))
        total = switch_loss(value, mean) + quadratic_loss(value, mean)  # type: ignore[arg-type]
        total.backward()
        assert score_NE.grad is not None
        return total.detach(), score_NE.grad

    halves = [slice(0, 4), slice(4, 8)]
    statistics: list[list[Tensor]] = []
    for half in halves:
        seen: list[Tensor] = []
        loss_of(half, lambda value, seen=seen: (seen.append(value.detach()), value)[1])
        statistics.append(seen)
    means = [torch.stack(pair).mean(dim=0) for pair in zip(*statistics, strict=True)]
    whole, whole_grad = loss_of(slice(0, 8), lambda value: value)
    for half in halves:
        queue = iter(means)
        loss, grad = loss_of(half, lambda value, queue=queue: value + (next(queue) - value).detach())
        torch.testing.assert_close(loss, whole)
        # A process's own gradient counts its tokens as the whole batch; averaging over two processes halves it.
        torch.testing.assert_close(grad / 2, whole_grad[half])


def test_sign_bias_moves_each_expert_by_the_rate_against_its_load_error() -> None:
    bias = sign_bias(torch.tensor([0.0, 0.5, -0.5, 0.0]), torch.tensor([9, 1, 4, 2]), rate=0.25)
    assert bias.tolist() == [-0.25, 0.75, -0.5, 0.25]


def test_sign_bias_stays_when_loads_are_equal_though_their_mean_is_not_a_binary_number() -> None:
    counts = torch.full((49,), 10**15 + 1)
    assert torch.equal(sign_bias(torch.zeros(49), counts, rate=1.0), torch.zeros(49))
