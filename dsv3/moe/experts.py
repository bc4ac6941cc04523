"""The routed experts: E SwiGLU networks whose weights are stacked, and the choice of how tokens reach them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.config import Model
from dsv3.moe.dispatch import Product, choose, reference
from dsv3.moe.memory import ReusedMemory
from dsv3.moe.routing import Routing


class Experts(nn.Module):
    """Stacked experts: `gate_up` [E, D, 2F] (gate first) and `down` [E, F, D], inputs before outputs."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.moe is not None, "Experts needs a model with model.moe"
        experts, hidden, inner = model.moe.n_routed_experts, model.hidden_size, model.moe.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=model.initializer_range)
        self._gradient_memory = ReusedMemory(), ReusedMemory()
        self.product: Product | None = None  # set from outside, by dsv3.precision.apply

    def forward(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        """The weighted sum of each token's experts, in x's type."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x_ND, gate_up, down = x.to(dtype), self.gate_up.to(dtype), self.down.to(dtype)
            if self.product is not None:
                return reference(x_ND, routing, gate_up, down, self.product).to(x.dtype)
            return choose(x_ND, routing, down, self._gradient_memory)(x_ND, routing, gate_up, down).to(x.dtype)
