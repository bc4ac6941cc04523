"""Send each token to its experts and add up what comes back: y_n = sum_k w_nk E_k(x_n), E(x) = (silu(x W_gate) * (x W_up)) W_down.

Weights are stacked and stored inputs first, gate_up [E, D, 2F] and down [E, F, D]: with few rows per expert a CPU multiplies that layout faster
than Hugging Face's [E, 2F, D]. Every implementation has the signature `Dispatch` and sums contributions in float32 or better.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv3.moe.routing import Routing

Dispatch = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]


def reference(
    x: Float[Tensor, "N D"], routing: Routing, gate_up: Float[Tensor, "E D twoF"], down: Float[Tensor, "E F D"]
) -> Float[Tensor, "N D"]:
    """One expert after the other, in the plainest form; any floating type."""
    weights_NK = routing.weights if routing.kept is None else routing.weights * routing.kept
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert, (gate_up_D2F, down_FD) in enumerate(zip(gate_up, down, strict=True)):
        token, slot = (routing.indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up_D2F).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ down_FD
        y = y.index_add(0, token, out.to(y.dtype) * weights_NK[token, slot, None].to(y.dtype))
    return y.to(x.dtype)
