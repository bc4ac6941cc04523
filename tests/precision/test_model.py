"""The policy on the real model: what it covers, and that a step of each precision agrees with fp32."""

import pytest
import torch
from torch import Tensor

from dsv3.config import BFloat16, Float8Block, Float16, Float32, Precision, presets, vary
from dsv3.model import Transformer
from dsv3.moe import MoELayer
from dsv3.precision import apply, autocast, initial, named, unscale

CONFIG = presets.tiny().model
# Without routers: rounding that flips a near-tie between two experts moves a gradient by far more than any eps.
DENSE = vary(CONFIG, moe=None)
REDUCED = [
    (BFloat16(), "bf16"),
    (Float16(), "fp16"),
    (Float8Block(), "e4m3"),
    (Float8Block(scale="ue8m0"), "e4m3"),
    (Float8Block(format="e5m2"), "e5m2"),
]


def loss_and_gradients(precision: Precision) -> tuple[Tensor, Tensor]:
    """One forward and backward of the dense model on random tokens; the gradients as one vector."""
    model = Transformer(DENSE, seed=0)
    apply(model, precision)
    state = initial(precision)
    tokens = torch.randint(0, DENSE.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    with autocast(precision, "cpu"):
        logits = model(tokens[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    (loss if state is None else loss * state.scale).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if state is not None:
        assert unscale(gradients, state) is None
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture(scope="module")
def in_fp32() -> tuple[Tensor, Tensor]:
    return loss_and_gradients(Float32())


def test_attention_experts_and_dense_layers_are_on_codes_and_the_head_is_not() -> None:
    model = Transformer(CONFIG, seed=0)
    scope = apply(model, Float8Block())
    layers = CONFIG.num_hidden_layers
    assert scope.kept == ("lm_head", "mtp.0.eh_proj")
    assert sum(name.endswith("mlp.experts") for name in scope.on_codes) == layers - CONFIG.first_k_dense_replace + 1
    assert sum(name.endswith("self_attn.o_proj") for name in scope.on_codes) == layers + 1
    # What is left: the embedding, the head, eh_proj and the routers.
    left = 2 * CONFIG.vocab_size * CONFIG.hidden_size + 2 * CONFIG.hidden_size**2
    left += 4 * CONFIG.moe.n_routed_experts * CONFIG.hidden_size
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)
    assert scope.share == 1 - left / matrices


@pytest.mark.parametrize("precision, form", REDUCED)
def test_loss_and_gradients_agree_with_fp32_as_far_as_the_format_goes(
    precision: Precision, form: str, in_fp32: tuple[Tensor, Tensor]
) -> None:
    loss, gradient = loss_and_gradients(precision)
    eps = named(form).eps
    # The loss of an untrained model is near ln V whatever small logits it has; its gradients show the format.
    torch.testing.assert_close(loss, in_fp32[0], rtol=eps / 10, atol=0)
    error = ((gradient - in_fp32[1]).norm() / in_fp32[1].norm()).item()
    # Rounding both operands costs a product 0.4 eps (root mean square); some 20 in a row, independent, add up to 2 eps.
    assert 0 < error <= 2 * eps


@pytest.mark.parametrize("precision, form", [row for row in REDUCED if isinstance(row[0], Float8Block)])
def test_experts_on_codes_agree_with_fp32_under_the_same_routing(precision: Precision, form: str) -> None:
    torch.manual_seed(0)
    layer = MoELayer(CONFIG)
    x = torch.randn(2, 63, CONFIG.hidden_size)
    upstream = torch.randn(2, 63, CONFIG.hidden_size)
    found = []
    for chosen in (Float32(), precision):
        apply(layer, chosen)
        layer.zero_grad()
        here = x.clone().requires_grad_()
        y, routing = layer(here)
        y.backward(upstream)
        found.append(
            (routing.indices, y, here.grad, layer.experts.gate_up.grad.clone(), layer.experts.down.grad.clone())
        )
    (indices, *exact), (same, *rounded) = found
    assert torch.equal(indices, same), "the router reads x itself, so rounding products moves no choice"
    for a, b in zip(exact, rounded, strict=True):
        assert 0 < ((a - b).norm() / a.norm()).item() <= named(form).eps
