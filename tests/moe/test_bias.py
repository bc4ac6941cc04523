"""What moves the selection bias: by hand, invariant to what should not matter, causal, and fast out of a collapse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.config import (
    Balance,
    CentredSignBias,
    Fixed,
    MoE,
    ProportionalBias,
    QuantileBias,
    SequenceLoss,
    SignBias,
    ZLoss,
)
from dsv3.moe import Routing, histogram_bias, max_vio, max_vio_floor, proportional_bias, quantile_bias, z_loss
from dsv3.moe.bias import demand, histogram, margins, moved
from dsv3.moe.capacity import drop
from dsv3.moe.router import select
from dsv3.moe.routing import count
from tests.moe.layers import layer_of

BIASES: dict[str, Balance] = {
    "sign": SignBias(rate=0.01),
    "centred sign": CentredSignBias(rate=0.01),
    "proportional": ProportionalBias(rate=0.01),
    "quantile": QuantileBias(bins=1000),
    "exact quantile": QuantileBias(bins=None),
}
ADDS_UP = {name: method for name, method in BIASES.items() if name != "exact quantile"}
every_bias = pytest.mark.parametrize("method", BIASES.values(), ids=BIASES.keys())


def moe_of(method: Balance, experts: int = 8, k: int = 2) -> MoE:
    return MoE(n_routed_experts=experts, num_experts_per_tok=k, moe_intermediate_size=16, balance=(method,))


def routed(scores: Tensor, bias: Tensor, moe: MoE) -> Routing:
    indices = select(scores + bias, moe)
    return Routing(indices, scores.gather(1, indices), scores, count(indices, len(bias)))


def asked(routing: Routing, bias: Tensor, moe: MoE) -> Tensor:
    found = demand(routing, bias, moe)
    return routing.counts if found is None else found


def drawn(tokens: int, experts: int, seed: int) -> Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))


def test_proportional_bias_by_hand() -> None:
    bias = proportional_bias(torch.tensor([0.0, 0.5, 0.0, 0.0]), torch.tensor([8, 4, 4, 0]), rate=0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.5, 0.0, 0.1]))
    assert torch.equal(proportional_bias(torch.zeros(3), torch.zeros(3, dtype=torch.int64), rate=1.0), torch.zeros(3))


def test_quantile_bias_by_hand() -> None:
    """K = 1 of E = 2, four tokens that all prefer expert 0 by 0.8, 0.6, 0.4 and 0.2. Each margin of expert 0 is the
    second score minus its own, -0.8 to -0.2, of expert 1 zero. Half of the tokens lie at or below -0.6.
    """
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    bias = quantile_bias(torch.zeros(2), margins(scores, torch.zeros(2), k=1), k=1)
    torch.testing.assert_close(bias, torch.tensor([-0.3, 0.3]))
    # at the border itself, so that one of both takes the token there; a hair beyond, loads are equal
    assert routed(scores, bias + torch.tensor([1e-3, 0.0]), moe_of(SignBias(), 2, 1)).counts.tolist() == [2, 2]


@given(st.integers(0, 2**31), st.integers(20, 200), st.integers(2, 16))
@settings(max_examples=30)
def test_histograms_come_as_near_to_the_exact_quantile_as_a_bin_is_wide(seed: int, tokens: int, experts: int) -> None:
    k, bins = seed % (experts - 1) + 1, 4000
    bias = 0.3 * torch.randn(experts, generator=torch.Generator().manual_seed(seed))
    scores = drawn(tokens, experts, seed + 1)
    counts = histogram(scores, bias, k, bins)
    assert counts.sum(dim=1).tolist() == [tokens] * experts
    width = float(bias.max() - bias.min() + 2) / bins
    margins = (scores + bias).topk(k + 1).values[:, k:] - scores
    place = tokens * k / experts
    low, high = (margins.sort(dim=0).values[min(max(int(place) + step, 0), tokens - 1)] for step in (-1, 1))
    found = histogram_bias(bias, counts, k)
    shift = float((low + high).mean()) / 2  # centring takes a mean that the exact one need not share
    spread = (high - low).max().item() + 2 * width
    assert ((found - (low + high) / 2 + shift).abs() <= spread + 1e-4).all()


@pytest.mark.parametrize("method", ADDS_UP.values(), ids=ADDS_UP.keys())
def test_updates_know_neither_units_nor_microbatches(method: Balance) -> None:
    moe, bias = moe_of(method), 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    scores = drawn(120, 8, 1)
    whole = moved(bias, asked(routed(scores, bias, moe), bias, moe), moe)
    parts = [asked(routed(part, bias, moe), bias, moe) for part in scores.split(40)]
    assert torch.equal(moved(bias, torch.stack(parts).sum(0), moe), whole)
    torch.testing.assert_close(moved(bias, 7 * torch.stack(parts).sum(0), moe), whole)
    assert not torch.equal(whole, bias)


def test_centring_changes_no_choice() -> None:
    moe, scores = moe_of(SignBias()), drawn(200, 8, 2).double()
    bias = torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one, other = (routed(scores, x, moe).indices.sort().values for x in (bias, bias - bias.mean()))
    assert torch.equal(one, other)


def test_centred_signs_move_biases_as_signs_do_but_for_one_number_for_all() -> None:
    bias, counts = torch.tensor([0.25, -0.25, 0.5, -0.5]), torch.tensor([9, 1, 1, 1])
    plain, centred = (moved(bias, counts, moe_of(kind(rate=0.5), 4)) for kind in (SignBias, CentredSignBias))
    assert plain.tolist() == [-0.25, 0.25, 1.0, 0.0]
    assert centred.tolist() == [-0.5, 0.0, 0.75, -0.25]


@every_bias
def test_demand_is_counted_before_dropping(method: Balance) -> None:
    """A capacity of the mean makes every busy expert look just full: a bias that read that would never move."""
    moe, bias = moe_of(method), torch.zeros(8)
    scores = drawn(64, 8, 4) * torch.linspace(0.2, 1.0, 8)
    routing = routed(scores, bias, moe)
    dropped = drop(routing, moe, Fixed(factor=1.0))
    assert dropped.kept is not None
    assert not dropped.kept.all()
    assert torch.equal(asked(dropped, bias, moe), asked(routing, bias, moe))
    after = moved(bias, asked(dropped, bias, moe), moe)
    assert after[0] > after[-1]


@every_bias
def test_the_bias_has_no_gradient_and_survives_a_checkpoint_and_a_cast(method: Balance) -> None:
    layer = layer_of(moe_of(method))
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(5))
    y, routing = layer(x)
    assert not layer.gate.e_score_correction_bias.requires_grad
    y.sum().backward()
    layer.update_bias(asked(routing, layer.gate.e_score_correction_bias, layer.moe))
    bias = layer.gate.e_score_correction_bias.clone()
    assert bias.abs().sum() > 0
    other = layer_of(moe_of(method), seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.gate.e_score_correction_bias, bias)
    assert torch.equal(other.bfloat16().gate.e_score_correction_bias, bias)


@every_bias
def test_no_token_is_routed_by_a_later_one(method: Balance) -> None:
    layer = layer_of(moe_of(method), bias=0.2)
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(6))
    changed = x.clone()
    changed[:, 20:] = 3.0
    before, after = (layer(each)[1].indices[:20] for each in (x, changed))
    assert torch.equal(before, after)


def steps_to_recover(method: Balance, collapse: str, seed: int, most: int = 11) -> int:
    """Steps until MaxVio is 1.5 times its floor, of 128 experts with 64 rows each, 2 a token, under scores that drift.

    Six experts are preferred by a bias (MaxVio over 40) or by the router itself (17 to 30).
    """
    experts, k, tokens = 128, 2, 4096
    generator = torch.Generator().manual_seed(seed)
    preference = torch.randn(experts, generator=generator)
    moe, bias = moe_of(method, experts, k), torch.zeros(experts)
    if collapse == "bias":
        bias[:6] = 1.5
    else:
        preference[:6] += 2.0
    for step in range(most):
        preference += 0.02 * torch.randn(experts, generator=generator)
        scores = (preference + torch.randn(tokens, experts, generator=generator)).sigmoid()
        routing = routed(scores, bias, moe)
        violation = float(max_vio(routing.counts))
        assert step > 0 or violation > 15, "no collapse to recover from"
        if violation <= 1.5 * max_vio_floor(experts, k, tokens):
            return step
        bias = moved(bias, asked(routing, bias, moe), moe)
    return most


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("collapse", ["bias", "router"])
def test_quantiles_lead_out_of_a_collapse_within_ten_steps(collapse: str, seed: int) -> None:
    histograms, exact = (steps_to_recover(QuantileBias(bins=bins), collapse, seed) for bins in (1000, None))
    assert histograms <= 10
    assert exact <= 10


@pytest.mark.parametrize("method", [SignBias(rate=0.001), SignBias(rate=0.01), ProportionalBias(rate=0.01)], ids=repr)
def test_steps_of_a_fixed_rate_take_longer(method: Balance) -> None:
    assert steps_to_recover(method, "router", seed=0) == 11


@pytest.mark.parametrize("bins", [1000, None])
def test_momentum_keeps_a_part_of_the_old_bias(bins: int | None) -> None:
    bias, scores = torch.zeros(8), drawn(100, 8, 7)
    quick, slow = (moe_of(QuantileBias(bins=bins, momentum=momentum)) for momentum in (0.0, 0.75))
    full, part = (moved(bias, asked(routed(scores, bias, moe), bias, moe), moe) for moe in (quick, slow))
    torch.testing.assert_close(part, full / 4)


def test_where_every_expert_is_chosen_quantiles_move_nothing() -> None:
    moe, scores = moe_of(QuantileBias(), 4, 4), drawn(10, 4, 8)
    assert torch.equal(
        moved(torch.zeros(4), asked(routed(scores, torch.zeros(4), moe), torch.zeros(4), moe), moe), torch.zeros(4)
    )
    exact = moe_of(QuantileBias(bins=None), 4, 4)
    routing = routed(scores, torch.zeros(4), exact)
    assert torch.equal(moved(torch.zeros(4), asked(routing, torch.zeros(4), exact), exact), torch.zeros(4))


def test_a_batch_without_tokens_centres_a_quantile_and_no_more() -> None:
    bias = torch.tensor([0.75, 0.25, 0.0, 0.0])
    assert quantile_bias(bias, margins(torch.zeros(0, 4), bias, 2), 2).tolist() == [0.5, 0.0, -0.25, -0.25]


def test_an_exact_quantile_gives_each_expert_its_share_of_the_margins() -> None:
    """Of 100 tokens a share 2 / 8 is 25, and so many of an expert's margins lie at or below its quantile."""
    moe, bias, scores = moe_of(QuantileBias(bins=None)), torch.linspace(-0.2, 0.2, 8), drawn(100, 8, 9)
    found = asked(routed(scores, bias, moe), bias, moe)
    quantiles = found.sort(dim=1).values[:, 24]
    torch.testing.assert_close(moved(bias, found, moe), quantiles - quantiles.mean())


def test_z_loss_by_hand() -> None:
    """Two experts: log(e^0 + e^0) = log 2, and log(3 + 1) = log 4."""
    logits = torch.tensor([[0.0, 0.0], [1.0986122887, 0.0]])
    routing = Routing(
        torch.tensor([[0], [0]]), torch.ones(2, 1), logits.softmax(-1), torch.tensor([2, 0]), logits=logits
    )
    expected = (torch.tensor(2.0).log() ** 2 + torch.tensor(4.0).log() ** 2) / 2
    torch.testing.assert_close(z_loss(routing), expected)
    layer = layer_of(MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, balance=(ZLoss(),)))
    assert layer(torch.randn(1, 5, 16))[1].logits is not None
    assert layer_of(moe_of(SignBias(), 4))(torch.randn(1, 5, 16))[1].logits is None


def test_configs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="moves one bias in several ways"):
        MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, balance=(SignBias(), QuantileBias()))
    with pytest.raises(ValueError, match="n_group=2: must be 1 with a QuantileBias"):
        MoE(
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            n_group=2,
            topk_group=2,
            balance=(QuantileBias(), SequenceLoss()),
        )
    with pytest.raises(ValueError, match=r"momentum=1\.0: must be below 1"):
        QuantileBias(momentum=1.0)
