"""The layer against transformers' DeepseekV3MoE: outputs, choices and gradients."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from dsv3.config import MoE
from dsv3.moe import MoELayer
from tests.moe.layers import layer_of

HIDDEN = 32
VARIANTS = {
    "one group": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "groups": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "groups of two": {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 6, "topk_group": 3},
    "without normalisation": {"n_routed_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "every expert": {"n_routed_experts": 4, "num_experts_per_tok": 4},
    "two shared experts": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2},
}


def theirs(moe: MoE, layer: MoELayer) -> DeepseekV3MoE:
    """transformers' layer with the weights of `layer`, experts stored outputs first."""
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=moe.moe_intermediate_size,
        n_routed_experts=moe.n_routed_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        n_shared_experts=moe.n_shared_experts,
        n_group=moe.n_group,
        topk_group=moe.topk_group,
        norm_topk_prob=moe.norm_topk_prob,
        routed_scaling_factor=moe.routed_scaling_factor,
    )
    config._experts_implementation = "eager"
    peer = DeepseekV3MoE(config)
    state = layer.state_dict()
    state["experts.gate_up_proj"] = state.pop("experts.gate_up").transpose(1, 2)
    state["experts.down_proj"] = state.pop("experts.down").transpose(1, 2)
    peer.load_state_dict(state)
    return peer


@pytest.mark.parametrize("bias", [0.0, 0.4, -2.0], ids=["no bias", "biases of both signs", "negative biases"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("tokens", [1, 63])
def test_outputs_and_gradients_equal_those_of_transformers(variant: dict[str, int], bias: float, tokens: int) -> None:
    moe = MoE(moe_intermediate_size=16, routed_scaling_factor=2.5, **variant)  # type: ignore[arg-type]
    ours = layer_of(moe, HIDDEN, bias=abs(bias))
    if bias < 0:
        # Every biased score is negative: a closed group at zero would win.
        ours.gate.e_score_correction_bias.sub_(3.0)
    peer = theirs(moe, ours)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, tokens, HIDDEN, generator=generator)
    toward = torch.randn(1, tokens, HIDDEN, generator=generator)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = ours(mine)
    y.backward(toward)
    y_peer = peer(other)
    y_peer.backward(toward)
    assert torch.equal(routing.indices.sort().values, peer.gate(x)[2].sort().values)
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    gradients["experts.gate_up"] = gradients.pop("experts.gate_up_proj").transpose(1, 2)
    gradients["experts.down"] = gradients.pop("experts.down_proj").transpose(1, 2)
    pairs = {"output": (y, y_peer), "input": (mine.grad, other.grad)}
    pairs |= {name: (parameter.grad, gradients[name]) for name, parameter in ours.named_parameters()}
    for name, (found, truth) in pairs.items():
        # fp32 sums of up to 63 x 32 products in other orders; the largest entry sets the scale.
        bound = 8 * torch.finfo(torch.float32).eps * (tokens * HIDDEN) ** 0.5 * truth.abs().max().item()
        torch.testing.assert_close(
            found, truth, rtol=0.0, atol=max(bound, 1e-12), msg=lambda text, n=name: f"{n}: {text}"
        )
