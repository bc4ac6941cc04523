"""SwiGLU feed-forward network (arXiv 2002.05202): down(silu(gate(x)) * up(x)).

No biases; names as in the published checkpoints.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def swiglu(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    """silu(gate) * up, silu(z) = z * sigmoid(z)."""
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """A dense feed-forward network, or one expert, of inner width `inner`."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The network's output for each row."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
