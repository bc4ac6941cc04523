"""What holds for every router, load and capacity."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite

from dsv3.config import Fixed, MoE, vary
from dsv3.moe import (
    Routing,
    expert_capacity,
    load_statistics,
    quadratic_loss,
    route,
    sequence_loss,
    sign_bias,
    switch_loss,
)
from dsv3.moe.capacity import drop
from dsv3.moe.router import gate_weights, score
from dsv3.moe.routing import count

quick = settings(max_examples=30)
WIDTH = 6


@composite
def routers(draw: DrawFn) -> MoE:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, groups))
    return MoE(
        n_routed_experts=groups * per_group,
        num_experts_per_tok=draw(st.integers(1, topk_group * per_group)),
        moe_intermediate_size=4,
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        n_group=groups,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.floats(0.1, 4.0)),
    )


@composite
def routed(draw: DrawFn) -> tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A router, tokens, its weight and a bias of both signs."""
    moe = draw(routers())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    tokens = draw(st.integers(0, 20))
    x = torch.randn(tokens, WIDTH, generator=generator)
    weight = torch.randn(moe.n_routed_experts, WIDTH, generator=generator)
    return moe, x, weight, torch.rand(moe.n_routed_experts, generator=generator) - 0.5


def by_expert(routing: Routing) -> torch.Tensor:
    """Gate weights as a table [N, E], zero where an expert is not chosen."""
    table = torch.zeros_like(routing.scores)
    return table.scatter(1, routing.indices, routing.weights)


@quick
@given(routed())
def test_every_token_has_k_distinct_experts_and_they_are_counted(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    moe, x, weight, bias = given
    routing = route(x, weight, bias, moe)
    assert routing.counts.sum() == len(x) * moe.num_experts_per_tok
    assert all(len(set(row)) == moe.num_experts_per_tok for row in routing.indices.tolist())
    if moe.norm_topk_prob:
        total = torch.full((len(x),), moe.routed_scaling_factor)
        torch.testing.assert_close(routing.weights.sum(dim=1), total)


@quick
@given(routed(), st.randoms(use_true_random=False))
def test_renaming_the_experts_renames_the_routing(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor], random: object
) -> None:
    moe, x, weight, bias = given
    moe = vary(moe, n_group=1, topk_group=1)
    order = list(range(moe.n_routed_experts))
    random.shuffle(order)  # type: ignore[attr-defined]
    renamed = route(x, weight[order], bias[order], moe)
    torch.testing.assert_close(by_expert(renamed), by_expert(route(x, weight, bias, moe))[:, order])


@quick
@given(routed())
def test_bias_never_changes_the_weights_of_the_same_choice(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    moe, x, weight, bias = given
    plain, biased = (route(x, weight, added, moe) for added in (torch.zeros_like(bias), bias))
    same = (by_expert(plain) > 0).eq(by_expert(biased) > 0).all(dim=1)
    torch.testing.assert_close(by_expert(plain)[same], by_expert(biased)[same])
    # A bias that favours no expert changes no choice either, but for rounding of near-ties.
    lifted = route(x.double(), weight.double(), torch.full_like(bias, 0.25), moe)
    torch.testing.assert_close(by_expert(lifted), by_expert(route(x.double(), weight.double(), 0 * bias, moe)))


@quick
@given(routed())
def test_gradient_reaches_the_router_and_never_the_bias(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    moe, x, weight, bias = given
    weight.requires_grad_()
    bias.requires_grad_()
    routing = route(x, weight, bias, vary(moe, norm_topk_prob=False))
    routing.weights.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert bias.grad is None


@quick
@given(
    st.integers(0, 12),
    st.integers(2, 8),
    st.sampled_from(["sigmoid", "softmax"]),
    st.floats(-1e3, 1e3),
    st.floats(0.0, 50.0),
    st.integers(0, 2**32 - 1),
)
def test_whatever_the_logits_losses_and_weights_have_the_values_and_gradients_of_float64(
    tokens: int, experts: int, scoring: str, centre: float, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = centre + spread * torch.randn(tokens, experts, generator=generator)
    toward = torch.rand(tokens, 2, generator=generator)
    moe = MoE(n_routed_experts=experts, num_experts_per_tok=2, moe_intermediate_size=4, scoring_func=scoring)
    chosen = logits.topk(2).indices
    found = []
    for leaf in (logits.clone().requires_grad_(), logits.double().requires_grad_()):
        scores = score(leaf, moe)
        weights = gate_weights(scores, chosen, moe)
        routing = Routing(chosen, weights, scores, count(chosen, experts))
        sums = switch_loss(routing), quadratic_loss(routing), (weights * toward).sum()
        gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in sums]
        found.append([*(value.detach() for value in sums), *gradients])
        # equal in float32, two scores differ in float64: its experts may be others, but what it gives is finite
        sequence = sequence_loss(routing, batch=1)
        assert sequence.isfinite()
        assert torch.autograd.grad(sequence, leaf)[0].isfinite().all()
    for single, double in zip(*found, strict=True):
        # a sum over a few experts and tokens, times E, of probabilities with a few roundings each
        bound = 16 * torch.finfo(torch.float32).eps * experts * max(tokens, 1)
        torch.testing.assert_close(single.double(), double, rtol=0.0, atol=bound)


@quick
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 10**6), st.floats(1e-5, 1.0))
def test_bias_update_does_not_depend_on_the_unit_of_load(counts: list[int], unit: int, rate: float) -> None:
    load = torch.tensor(counts)
    bias = torch.zeros(len(counts))
    update = sign_bias(bias, load, rate)
    assert torch.equal(update, sign_bias(bias, load * unit, rate))
    assert (update * (load.double().mean() - load) >= 0).all()


@quick
@given(routed(), st.floats(0.05, 3.0), st.sampled_from(["probability", "position"]))
def test_experts_take_as_many_as_they_can_up_to_their_capacity(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor], factor: float, policy: str
) -> None:
    moe, x, weight, bias = given
    routing = drop(route(x, weight, bias, moe), moe, Fixed(factor=factor, policy=policy))
    assert routing.kept is not None
    taken = count(routing.indices[routing.kept], moe.n_routed_experts)
    capacity = expert_capacity(len(x), moe, factor)
    assert torch.equal(taken, routing.counts.clamp(max=capacity))


@quick
@given(routed(), st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_more_capacity_drops_nothing_more(
    given: tuple[MoE, torch.Tensor, torch.Tensor, torch.Tensor], factor: float, more: float
) -> None:
    moe, x, weight, bias = given
    routing = route(x, weight, bias, moe)
    less, plenty = (drop(routing, moe, Fixed(factor=value)).kept for value in (factor, factor + more))
    assert less is not None
    assert plenty is not None
    assert (plenty | ~less).all()


@quick
@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(lambda counts: sum(counts) > 0), st.integers(2, 9))
def test_load_statistics_lie_in_their_ranges_and_ignore_the_names_of_experts(counts: list[int], times: int) -> None:
    load = torch.tensor(counts)
    found, reversed_ = load_statistics(load, k=1), load_statistics(load.flip(0), k=1)
    assert 0 <= found.max_vio <= len(counts) - 1
    assert 0 <= found.gini < 1
    assert 1 - 1e-9 <= found.effective_experts <= len(counts) - found.dead + 1e-9
    assert found.max_vio == reversed_.max_vio
    assert found.gini == reversed_.gini
    # Shares, not counts: as many times the tokens in the same proportion change nothing but the floors.
    scaled = load_statistics(load * times, k=1)
    assert abs(scaled.gini - found.gini) < 1e-9
    assert abs(scaled.cv - found.cv) < 1e-9
