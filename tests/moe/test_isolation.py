"""Separate gradient paths: what every sparse layer has to the bit, and a norm that does not know where experts are."""

import functools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.config import MoE, QuadraticLoss, SequenceLoss, SignBias, SwitchLoss
from dsv3.moe import MoELayer, Routing, balance_losses
from dsv3.moe.isolation import (
    agreement,
    clip_by_expert,
    cross_expert_jacobian,
    expert_norms,
    router_agreement,
    sharded_norm,
)
from tests.moe import sharded_experts
from tests.moe.layers import layer_of
from tests.moe.sharded_experts import LAYOUTS, STARVED
from tests.train import small

ROOT = Path(__file__).parents[2]
RELATIVE = 1e-6  # about ten roundings of fp32 (eps 6e-8)
MOE = MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
quick = settings(max_examples=40)


def routed(layer: MoELayer, tokens: int = 12, without: int | None = None) -> tuple[Tensor, Routing]:
    """Tokens and their routing in the layer's type; `without` is an expert that gets none."""
    with torch.no_grad():
        layer.gate.e_score_correction_bias.zero_()
        if without is not None:
            layer.gate.e_score_correction_bias[without] = -10.0
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = x.to(layer.gate.weight.dtype)
    return x, layer.gate(x)


def expert_gradients(layer: MoELayer, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and copies of the gradients of gate_up and down when a fixed gradient comes back to it."""
    y = layer.experts(x, routing)
    back = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    weights = layer.experts.gate_up, layer.experts.down
    gate_up, down = torch.autograd.grad(y, weights, back, retain_graph=True)
    return y.detach(), gate_up.clone(), down.clone()


def test_no_experts_output_depends_on_anothers_weights() -> None:
    layer = layer_of(MOE).double()
    x, routing = routed(layer, tokens=5, without=1)
    jacobian = cross_expert_jacobian(layer.experts, x, routing, (layer.experts.gate_up, layer.experts.down))
    assert jacobian[~torch.eye(4, dtype=torch.bool)].count_nonzero() == 0
    assert (jacobian.diagonal() > 0).tolist() == (routing.counts > 0).tolist() == [True, False, True, True]


def test_the_jacobian_sees_experts_that_do_depend_on_each_other() -> None:
    layer = layer_of(MOE).double()
    x, routing = routed(layer, tokens=3)

    def mixed(x: Tensor, routing: Routing) -> Tensor:
        return layer.experts(x, routing) * layer.experts.down[0].sum()

    jacobian = cross_expert_jacobian(mixed, x, routing, (layer.experts.gate_up, layer.experts.down))
    assert (jacobian[:, 0] > 0).tolist() == (routing.counts > 0).tolist()
    assert jacobian[1:, 1:][~torch.eye(3, dtype=torch.bool)].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [12, 400], ids=["few rows", "many rows"])
def test_another_experts_weights_change_no_bit_of_an_experts_gradient(dtype: torch.dtype, tokens: int) -> None:
    layer = layer_of(MOE).to(dtype)
    x, routing = routed(layer, tokens)
    before = expert_gradients(layer, x, routing)
    with torch.no_grad():
        layer.experts.gate_up[2] *= -3
        layer.experts.down[2] += 1
    after = expert_gradients(layer, x, routing)
    others = torch.tensor([0, 1, 3])
    elsewhere = ~(routing.indices == 2).any(dim=1)
    assert elsewhere.any()
    assert torch.equal(after[0][elsewhere], before[0][elsewhere])
    assert not torch.equal(after[0], before[0])
    for now, then in zip(after[1:], before[1:], strict=True):
        assert torch.equal(now[others], then[others])
        assert not torch.equal(now[2], then[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [12, 400], ids=["few rows", "many rows"])
def test_an_expert_without_tokens_has_a_gradient_of_exactly_zero(dtype: torch.dtype, tokens: int) -> None:
    layer = layer_of(MOE).to(dtype)
    expert_gradients(layer, *routed(layer, tokens))  # leaves numbers in memory that a later gradient may be given
    x, starved = routed(layer, tokens, without=1)
    dropped = replace(starved, kept=starved.indices != 3)
    for routing, idle in ((starved, [1]), (dropped, [1, 3])):
        for gradient in expert_gradients(layer, x, routing)[1:]:
            counts = gradient.flatten(1).count_nonzero(dim=1)
            assert [expert for expert in range(4) if counts[expert] == 0] == idle


def losses_at_the_router(moe: MoE) -> tuple[MoELayer, Tensor, dict[str, Tensor]]:
    """A layer, its language loss (a stand-in) and its balance losses."""
    layer = layer_of(moe)
    y, routing = layer(torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0)))
    return layer, y.square().mean(), balance_losses(routing, moe, batch=2)


@pytest.mark.parametrize(
    "method", [SequenceLoss(), SwitchLoss(), QuadraticLoss()], ids=lambda method: type(method).__name__
)
def test_a_balance_loss_pulls_at_the_router_by_what_it_adds_to_the_gradient(method: Any) -> None:
    layer, language, balance = losses_at_the_router(replace(MOE, balance=(method,)))
    (loss,) = balance.values()
    found = router_agreement(language, loss, layer.gate.weight)
    assert layer.gate.weight.grad is None
    (alone,) = torch.autograd.grad(language, layer.gate.weight, retain_graph=True)
    (both,) = torch.autograd.grad(language + loss, layer.gate.weight)
    assert abs(found.cosine) < 1
    # |a + b|^2 = |a|^2 (1 + 2 r cos + r^2)
    expected = alone.norm() * math.sqrt(1 + 2 * found.norm_ratio * found.cosine + found.norm_ratio**2)
    assert both.norm().item() == pytest.approx(expected.item(), rel=1e-5)  # the loss scaled by alpha adds few digits
    assert found.norm_ratio > 0


def test_twice_the_weight_of_a_loss_is_twice_the_ratio_and_the_same_cosine() -> None:
    layer, language, balance = losses_at_the_router(replace(MOE, balance=(SwitchLoss(),)))
    once = router_agreement(language, balance["switch"], layer.gate.weight)
    twice = router_agreement(language, 2 * balance["switch"], layer.gate.weight)
    assert twice.norm_ratio == pytest.approx(2 * once.norm_ratio)
    assert twice.cosine == pytest.approx(once.cosine)


def test_a_bias_or_a_detached_score_does_not_pull_at_the_router() -> None:
    layer, language, balance = losses_at_the_router(replace(MOE, balance=(SignBias(rate=0.1),)))
    assert balance == {}
    assert not layer.gate.e_score_correction_bias.requires_grad
    nothing = router_agreement(language, torch.zeros(()), layer.gate.weight)
    assert nothing.norm_ratio == 0.0
    assert math.isnan(nothing.cosine)
    y, routing = layer(torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0)))
    moe = replace(MOE, balance=(SwitchLoss(alpha=10.0),))
    (loss,) = balance_losses(replace(routing, scores=routing.scores.detach()), moe, batch=2).values()
    weight = layer.gate.weight
    (alone,) = torch.autograd.grad(y.square().mean(), weight, retain_graph=True)
    (both,) = torch.autograd.grad(y.square().mean() + loss, weight)
    assert torch.equal(alone, both)


def test_agreement_of_two_gradients_by_hand() -> None:
    found = agreement(torch.tensor([3.0, 4.0]), torch.tensor([0.0, -10.0]))
    assert (found.cosine, found.norm_ratio) == (pytest.approx(-0.8), pytest.approx(2.0))
    assert agreement(torch.zeros(2), torch.ones(2)).norm_ratio == math.inf


def test_each_expert_is_clipped_by_its_own_norm_over_all_its_weights() -> None:
    first = torch.tensor([[[3.0, 0.0]], [[0.3, 0.0]], [[0.0, 0.0]]])
    second = torch.tensor([[4.0], [0.4], [0.0]])
    assert expert_norms((first, second)).tolist() == pytest.approx([5.0, 0.5, 0.0])
    clipped = clip_by_expert((first, second), most=1.0)
    assert expert_norms(clipped).tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert torch.equal(clipped[0][1:], first[1:])
    assert torch.equal(clipped[1][1:], second[1:])
    assert first[0, 0, 0] == 3.0, "gradients that are handed in stay as they are"


@quick
@given(st.integers(0, 2**32), st.floats(0.01, 10))
def test_clipping_one_expert_by_itself_is_torchs_clipping_of_its_parameters(seed: int, most: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(3, *shape, generator=generator) for shape in ((4, 6), (3, 4))]
    clipped = clip_by_expert(gradients, most)
    for expert in range(3):
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient[expert])) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[expert].clone()
        torch.nn.utils.clip_grad_norm_(parameters, most)
        for parameter, mine in zip(parameters, clipped, strict=True):
            torch.testing.assert_close(mine[expert], parameter.grad)


def test_a_loud_expert_shrinks_the_others_where_one_norm_clips_all_and_a_broken_one_breaks_them() -> None:
    for loud, others_left in ((100.0, 0.01), (math.inf, 0.0)):
        gradient = torch.ones(4, 1)
        gradient[2] = loud
        others = torch.tensor([0, 1, 3])
        assert torch.equal(clip_by_expert((gradient,), most=1.5)[0][others], torch.ones(3, 1))
        parameter = torch.nn.Parameter(torch.zeros(4, 1))
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        assert parameter.grad[others].flatten().tolist() == pytest.approx([others_left] * 3, rel=1e-3)


def test_no_norm_to_clip_to_is_refused() -> None:
    with pytest.raises(ValueError, match="most=0: must be a positive norm"):
        clip_by_expert((torch.ones(2, 2),), most=0)


@quick
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([1.0, 2.0, 3.0, math.inf]),
)
def test_the_norm_is_that_of_all_gradients_in_one_place(
    shard_sizes: list[list[int]], common_sizes: list[int], order: float
) -> None:
    generator = torch.Generator().manual_seed(sum(map(sum, shard_sizes)))
    shards = [[torch.randn(size, generator=generator) for size in sizes] for sizes in shard_sizes]
    common = [torch.randn(size, generator=generator) for size in common_sizes]
    everything = torch.cat([torch.zeros(1), *common, *(gradient for rank in shards for gradient in rank)]).double()
    own = torch.stack([sharded_norm(rank, [], order=order) for rank in shards])
    for rank in shards:
        found = sharded_norm(rank, common, order=order, gather=lambda norm: own)
        torch.testing.assert_close(found, torch.linalg.vector_norm(everything, order))


def test_alone_the_norm_is_torchs_and_a_parameter_without_gradient_counts_as_zero() -> None:
    gradients = [torch.randn(3, 4, generator=torch.Generator().manual_seed(at)) for at in range(3)]
    for order in (1.0, 2.0, math.inf):
        expected = torch.nn.utils.get_total_norm(gradients, norm_type=order).double()
        torch.testing.assert_close(sharded_norm(gradients[:1], gradients[1:], order=order), expected, rtol=1e-6, atol=0)
        found = sharded_norm([None, *gradients[:1]], [*gradients[1:], None], order=order)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert sharded_norm([None], []) == 0.0


def test_an_order_without_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order=0.5: must be at least 1; pass 2.0 or math.inf"):
        sharded_norm([], [torch.ones(2)], order=0.5)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """What four processes found, by layout and case."""
    out = tmp_path_factory.mktemp("ranks") / "four.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/moe/sharded_experts.py", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, dict[str, dict[str, Any]]] = torch.load(out, weights_only=True)
    return loaded


every_case = pytest.mark.parametrize("case", STARVED)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_order = pytest.mark.parametrize("order", sharded_experts.ORDERS)


@functools.cache
def alone(case: str) -> dict[str, Any]:
    """What one process finds."""
    return sharded_experts.measure(LAYOUTS["data 2"], STARVED[case])


@every_case
@every_layout
def test_gradients_and_norms_are_the_same_wherever_the_experts_are(
    found: dict[str, dict[str, dict[str, Any]]], layout: str, case: str
) -> None:
    one, many = alone(case), found[layout][case]
    assert (one["tokens"][3] == 0) == (case == "one has none")
    assert one["tokens"] == many["tokens"]
    for name, gradient in one["gradient"].items():
        assert small.relative_distance(gradient, many["gradient"][name]) < RELATIVE, name
    for order, norms in one["norms"].items():
        assert many["norms"][order]["same on all"], order
        assert many["norms"][order]["right"] == pytest.approx(norms["right"], rel=RELATIVE), order


@every_case
@every_order
def test_norms_of_single_ranks_and_their_mean_change_with_the_layout(
    found: dict[str, dict[str, dict[str, Any]]], order: float, case: str
) -> None:
    right = alone(case)["norms"][order]["right"]
    norms = {layout: by_case[case]["norms"][order] for layout, by_case in found.items()}
    whole = norms.pop("data 2")
    assert [*whole["local"], whole["averaged"]] == pytest.approx([right] * 3, rel=RELATIVE), "each rank has everything"
    for layout, wrong in norms.items():
        assert wrong["averaged"] < right * 0.9, "the mean of the ranks' norms misses experts of others"
        assert max(wrong["local"]) / min(wrong["local"]) > 1.3, "ranks would clip the trunk by different factors"
        omits = "one-sided" not in layout
        assert (wrong["local"][0] < right * 0.9) == omits, "a rank's norm omits the experts that it does not hold"
        assert wrong["local"] == wrong["local"][:2] * LAYOUTS[layout].data


@every_case
@every_layout
def test_ranks_norms_added_up_count_what_several_hold_so_many_times(
    found: dict[str, dict[str, dict[str, Any]]], layout: str, case: str
) -> None:
    gradient, (data, owned) = alone(case)["gradient"], LAYOUTS[layout]
    experts, others = (
        sum(gradient[name].double().square().sum().item() for name in names)
        for names in (("gate_up", "down"), ("trunk", "gate"))
    )
    wrong = found[layout][case]["norms"][2.0]
    assert wrong["repeated"] == pytest.approx((data * experts + others) ** 0.5, rel=RELATIVE)
    assert wrong["everything"] == pytest.approx((data * (experts + len(owned) * others)) ** 0.5, rel=RELATIVE)
    assert (wrong["repeated"] > 1.2 * wrong["right"]) == (data > 1), "right until experts have replicas"
    assert wrong["everything"] > 1.1 * wrong["right"]
    largest = found[layout][case]["norms"][math.inf]
    assert largest["repeated"] == largest["everything"] == largest["right"], "an infinity norm does not count"
