"""Routing with perfect balance, forced: what experts cost when no router can be blamed.

Token n goes to experts n K .. n K + K - 1 modulo E, experts and tokens renamed at random: loads differ by one at most,
and a token's experts are distinct. Gate weights are those of the router's own scores. Measurements under it say so:
published throughputs of mixtures of experts often do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv3.config import MoE
from dsv3.moe import MoELayer, Routing
from dsv3.moe.router import gate_weights
from dsv3.moe.routing import count


class BalancedGate(nn.Module):
    """Stands in for a layer's gate, and hands on its scores and bias."""

    def __init__(self, gate: nn.Module, moe: MoE, seed: int) -> None:
        super().__init__()
        self.gate = gate
        self.moe = moe
        self.seed = seed

    def forward(self, x: Tensor) -> Routing:
        """The gate's scores on a balanced choice."""
        scores = self.gate(x).scores
        indices = balanced_indices(len(x), self.moe, self.seed).to(x.device)
        return Routing(indices, gate_weights(scores, indices, self.moe), scores, count(indices, scores.shape[1]))

    @property
    def e_score_correction_bias(self) -> Tensor:
        """The bias that training goes on moving."""
        bias = self.gate.e_score_correction_bias
        assert isinstance(bias, Tensor), "a gate has a bias"
        return bias


@contextmanager
def forced_balance(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, every layer of experts in `model` routes with perfect balance."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    gates = [layer.gate for layer in layers]
    for at, layer in enumerate(layers):
        layer.gate = BalancedGate(layer.gate, layer.moe, seed + at)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, gate in zip(layers, gates, strict=True):
            layer.gate = gate


def balanced_indices(tokens: int, moe: MoE, seed: int) -> Tensor:
    """The experts [N, K] of each token."""
    generator = torch.Generator().manual_seed(seed)
    k, experts = moe.num_experts_per_tok, moe.n_routed_experts
    names = torch.randperm(experts, generator=generator)
    chosen = names[torch.arange(tokens * k).view(tokens, k) % experts]
    return chosen[torch.randperm(tokens, generator=generator)]
