"""Layers, routings and tensors that the tests of this room share."""

import torch
from torch import Tensor

from dsv3.config import Model, MoE, MultiHead
from dsv3.moe import MoELayer, Routing
from dsv3.moe.routing import count


def model_of(moe: MoE, hidden: int = 16) -> Model:
    """A model config around `moe`; only its hidden size matters to a layer."""
    return Model(
        vocab_size=8,
        hidden_size=hidden,
        num_hidden_layers=1,
        intermediate_size=32,
        attention=MultiHead(num_attention_heads=2, head_dim=8),
        moe=moe,
        initializer_range=0.3,
    )


def layer_of(moe: MoE, hidden: int = 16, seed: int = 0, bias: float = 0.0) -> MoELayer:
    """A layer with seeded weights and selection biases spread over [-bias, bias]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = MoELayer(model_of(moe, hidden))
        layer.gate.e_score_correction_bias.uniform_(-bias, bias)
    return layer


def random_routing(tokens: int, experts: int, k: int, dtype: torch.dtype, seed: int = 0, kept: float = 1.0) -> Routing:
    """Uniform routing with random weights, of whose pairs a share `kept` is kept (1.0: dropless)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    indices = scores.topk(k, sorted=False).indices
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64).to(dtype)
    mask = None if kept == 1.0 else torch.rand(tokens, k, generator=generator) < kept
    return Routing(indices, weights.requires_grad_(), scores.float(), count(indices, experts), mask)


def stacked_experts(experts: int, hidden: int, inner: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """gate_up and down of a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, hidden, 2 * inner, generator=generator, dtype=torch.float64) / hidden**0.5
    down = torch.randn(experts, inner, hidden, generator=generator, dtype=torch.float64) / inner**0.5
    return gate_up.to(dtype).requires_grad_(), down.to(dtype).requires_grad_()
