"""What every layer keeps, whatever its scoring, groups, balance and capacity."""

from itertools import product

import pytest
import torch

from dsv3.config import (
    Adaptive,
    Bias,
    CentredSignBias,
    Dropless,
    ExpertChoice,
    Fixed,
    MoE,
    ProportionalBias,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SimilarityLoss,
    SwitchLoss,
    ZLoss,
)
from dsv3.moe import balance_losses, dropped_share, load_statistics
from tests.moe.layers import layer_of, model_of

SCORINGS = ("sigmoid", "softmax")
GROUPS = {"one group": (1, 1), "2 of 4 groups": (4, 2)}
BALANCES = {
    "no balance": (),
    "bias and sequence": (SignBias(rate=0.01), SequenceLoss()),
    "switch": (SwitchLoss(),),
    "quadratic": (QuadraticLoss(),),
    "centred bias and z": (CentredSignBias(rate=0.01), ZLoss()),
    "proportional bias": (ProportionalBias(rate=0.01),),
    "quantile bias": (QuantileBias(bins=64),),
    "exact quantile bias": (QuantileBias(bins=None),),
    "similarity": (SimilarityLoss(),),
    "expert choice": (ExpertChoice(), ZLoss(), SimilarityLoss()),
}
CAPACITIES = {
    "dropless": Dropless(),
    "by probability": Fixed(factor=0.8),
    "by position": Fixed(factor=0.8, policy="position"),
    "reroute": Fixed(factor=0.8, policy="reroute"),
    "adaptive": Adaptive(),
}
VARIANTS = {
    ", ".join((scoring, groups, balance, capacity)): MoE(
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=8,
        scoring_func=scoring,
        n_group=GROUPS[groups][0],
        topk_group=GROUPS[groups][1],
        routed_scaling_factor=2.5,
        balance=BALANCES[balance],
        capacity=CAPACITIES[capacity],
    )
    for scoring, groups, balance, capacity in product(SCORINGS, GROUPS, BALANCES, CAPACITIES)
    if groups == "one group" or balance not in ("quantile bias", "exact quantile bias", "expert choice")
    if capacity == "dropless" or balance != "expert choice"
}
TOKENS_CHOOSE = {name: moe for name, moe in VARIANTS.items() if ExpertChoice() not in moe.balance}
every_variant = pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS.keys())
every_choice_of_tokens = pytest.mark.parametrize("moe", TOKENS_CHOOSE.values(), ids=TOKENS_CHOOSE.keys())


def batch(tokens: int = 21) -> torch.Tensor:
    return torch.randn(3, tokens // 3, 16, generator=torch.Generator().manual_seed(5))


@every_choice_of_tokens
def test_routing_is_valid_and_counted_before_dropping(moe: MoE) -> None:
    layer = layer_of(moe, bias=0.3)
    y, routing = layer(batch())
    assert y.shape == (3, 7, 16)
    assert routing.counts.sum() == 21 * 3
    assert all(len(set(row)) == 3 for row in routing.indices.tolist())
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.full((21,), 2.5))
    assert (routing.kept is None) == isinstance(moe.capacity, Dropless)
    assert 0.0 <= load_statistics(routing.counts, 3, routing.kept).dropped < 1.0
    groups = (routing.indices // (8 // moe.n_group)).tolist()
    assert max(len(set(row)) for row in groups) <= moe.topk_group


@every_variant
def test_gradients_are_finite_and_reach_every_parameter_but_no_bias(moe: MoE) -> None:
    layer = layer_of(moe, bias=0.3)
    y, routing = layer(batch())
    losses = balance_losses(routing, moe, batch=3)
    (y.square().sum() + sum(losses.values())).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert "gate.e_score_correction_bias" in layer.state_dict()
    assert not layer.gate.e_score_correction_bias.requires_grad


@every_variant
def test_losses_are_those_that_the_config_names(moe: MoE) -> None:
    losses = balance_losses(layer_of(moe)(batch())[1], moe, batch=3)
    named = {
        SequenceLoss: "sequence",
        SwitchLoss: "switch",
        QuadraticLoss: "quadratic",
        SimilarityLoss: "similarity",
        ZLoss: "z",
    }
    others = (Bias, ExpertChoice)
    assert set(losses) == {named[type(method)] for method in moe.balance if not isinstance(method, others)}
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())


@every_variant
def test_bias_moves_only_under_a_method_that_moves_it_and_against_the_load(moe: MoE) -> None:
    layer = layer_of(moe)
    routing = layer(batch())[1]
    asked = layer.demand(routing)
    layer.update_bias(routing.counts if asked is None else asked)
    bias = layer.gate.e_score_correction_bias
    if not any(isinstance(method, Bias) for method in moe.balance):
        assert not bias.any()
    else:
        assert bias[routing.counts.argmax()] < bias[routing.counts.argmin()]
    if SignBias(rate=0.01) in moe.balance:
        assert bias.abs().max().item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    "shape, lengths", [((3, 0), None), ((0, 5), None), ((3, 5), torch.zeros(3, dtype=torch.int64))], ids=str
)
@every_variant
def test_a_batch_without_tokens_asks_for_nothing(
    moe: MoE, shape: tuple[int, int], lengths: torch.Tensor | None
) -> None:
    layer = layer_of(moe, bias=0.3)
    bias = layer.gate.e_score_correction_bias.clone()
    y, routing = layer(torch.randn(*shape, 16), lengths)
    losses = balance_losses(routing, moe, batch=shape[0])
    of_weight = losses.pop("similarity", torch.zeros(()))
    assert all(loss.item() == 0.0 for loss in losses.values())
    pulled = y.sum() + sum(losses.values())
    for weight in (layer.gate.weight, layer.experts.gate_up, layer.experts.down):
        assert not torch.autograd.grad(pulled, weight, retain_graph=True, materialize_grads=True)[0].any()
    assert of_weight.isfinite()
    asked = layer.demand(routing)
    layer.update_bias(routing.counts if asked is None else asked)
    layer.update_capacity(routing.counts)
    low, high = (layer.gate.e_score_correction_bias - bias).aminmax()
    # centring adds one number to all biases, of which none is above 1
    assert high - low <= torch.finfo(torch.float32).eps
    assert layer.largest_load is None or layer.largest_load.isinf()
    assert dropped_share(routing.kept) == 0.0


@every_variant
def test_a_token_is_treated_at_inference_as_if_it_were_alone(moe: MoE) -> None:
    layer, x = layer_of(moe, bias=0.3).eval(), batch(tokens=6)
    together = layer(x)[0]
    alone = torch.cat([layer(row)[0] for row in x.view(6, 1, 1, 16)]).view_as(x)
    # fp32 sums of 16 and 8 products in another order, on outputs of about 1.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_state_has_the_published_names_and_stacked_weights() -> None:
    layer = layer_of(VARIANTS["sigmoid, 2 of 4 groups, bias and sequence, dropless"])
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "gate.weight": (8, 16),
        "gate.e_score_correction_bias": (8,),
        "experts.gate_up": (8, 16, 16),
        "experts.down": (8, 8, 16),
        "shared_experts.gate_proj.weight": (8, 16),
        "shared_experts.up_proj.weight": (8, 16),
        "shared_experts.down_proj.weight": (16, 8),
    }


def test_without_shared_experts_there_are_none() -> None:
    moe = MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=0)
    layer = layer_of(moe)
    assert layer.shared_experts is None
    assert layer(batch())[0].shape == (3, 7, 16)


def test_bias_stays_float32_when_the_model_is_cast_and_follows_it_to_a_device() -> None:
    layer = layer_of(MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8), bias=0.3)
    before = layer.gate.e_score_correction_bias.clone()
    cast = layer.bfloat16()
    assert cast.gate.weight.dtype == torch.bfloat16
    assert torch.equal(cast.gate.e_score_correction_bias, before)
    assert cast(batch().bfloat16())[0].dtype == torch.bfloat16
    assert layer.to("meta").gate.e_score_correction_bias.is_meta


def test_output_keeps_its_type_under_autocast_and_differs_by_bfloat16_rounding() -> None:
    layer = layer_of(MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=0))
    exact, _ = layer(batch())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, routing = layer(batch())
    assert rounded.dtype == torch.float32
    assert routing.scores.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_a_layer_is_built_without_memory_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = layer_of(MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8))
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert model_of(layer.moe).moe is layer.moe
