"""The DeepSeekMoE layer: y = sum of the chosen routed experts + the shared experts.

Sources: arXiv 2401.06066, and 2412.19437 section 2.1.2. Shared experts see every token, unweighted; n of them are one
SwiGLU of n times the width. Capacity, and experts that choose tokens, are for training only: at inference an output
must not depend on which other tokens are in the batch.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from dsv3.config import Adaptive, Dropless, ExpertChoice, Model, MoE
from dsv3.layers import SwiGLU
from dsv3.moe.bias import demand, moved
from dsv3.moe.capacity import averaged, drop
from dsv3.moe.expert_choice import choose_tokens
from dsv3.moe.experts import Experts
from dsv3.moe.router import route
from dsv3.moe.routing import Routing


class KeepsBuffers(nn.Module):
    """A module whose own buffers stay float32 in a cast model: in bfloat16 a bias above 0.5 would swallow updates of
    0.001.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsBuffers":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self


class Gate(KeepsBuffers):
    """The router's weight and its selection bias, which no optimizer sees."""

    e_score_correction_bias: Tensor

    def __init__(self, model: Model, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.n_routed_experts, model.hidden_size))
        nn.init.normal_(self.weight, std=model.initializer_range)
        self.register_buffer("e_score_correction_bias", torch.zeros(moe.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "N D"]) -> Routing:
        """Route every token, without capacity."""
        routing = route(x, self.weight, self.e_score_correction_bias, self.moe)
        if self.training and any(isinstance(method, ExpertChoice) for method in self.moe.balance):
            return choose_tokens(routing, self.moe)
        return routing


class MoELayer(KeepsBuffers):
    """Routed and shared experts of one block; an adaptive capacity has its average of past steps here."""

    largest_load: Tensor | None

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.moe is not None, "MoELayer needs a model with model.moe"
        self.moe = model.moe
        self.gate = Gate(model, model.moe)
        self.experts = Experts(model)
        shared = model.moe.n_shared_experts * model.moe.moe_intermediate_size
        self.shared_experts = SwiGLU(model.hidden_size, shared) if shared else None
        adaptive = isinstance(self.moe.capacity, Adaptive)
        self.register_buffer("largest_load", torch.tensor(math.inf) if adaptive else None)

    def forward(
        self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        """The layer's output, and what its router decided. `lengths`: tokens of each row before its padding, which no
        routed expert sees and no count, loss or capacity knows of.
        """
        x_ND = x.flatten(0, 1)
        if lengths is None:
            routing = self._route(x_ND)
            y_ND = self.experts(x_ND, routing)
        else:
            there = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).flatten().nonzero()[:, 0]
            tokens_ND = x_ND[there]
            routing = replace(self._route(tokens_ND), lengths=lengths)
            y_ND = torch.zeros_like(x_ND).index_copy(0, there, self.experts(tokens_ND, routing))
        y = y_ND.view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing

    def _route(self, x_ND: Tensor) -> Routing:
        routing: Routing = self.gate(x_ND)
        if not self.training or isinstance(self.moe.capacity, Dropless):
            return routing
        bias, average = self.gate.e_score_correction_bias, self.largest_load
        return drop(routing, self.moe, self.moe.capacity, bias=bias, average=average)

    def demand(self, routing: Routing) -> Num[Tensor, "E asked"] | None:
        """What `update_bias` has to know of a microbatch, to be summed over all of a step; None: its loads."""
        return demand(routing, self.gate.e_score_correction_bias, self.moe)

    def update_bias(self, asked: Num[Tensor, "E ..."]) -> None:
        """Move the selection bias by the demand of a whole step, after the optimizer's; it stays without a method."""
        bias = self.gate.e_score_correction_bias
        bias.copy_(moved(bias, asked.to(bias.device), self.moe))

    def update_capacity(self, counts: Int[Tensor, " E"]) -> None:
        """Move an adaptive capacity by the loads of a whole step, after the optimizer's."""
        if isinstance(self.moe.capacity, Adaptive) and self.largest_load is not None:
            average = self.largest_load
            average.copy_(averaged(average, counts.to(average.device), self.moe.capacity.momentum))
