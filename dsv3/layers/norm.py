"""RMSNorm: divide by the root mean square, multiply by a learned weight (arXiv 1910.07467).

    y = weight * (x / sqrt(mean(x^2) + eps))

Rounding order, the same as the published DeepSeek-V3 readers': statistics and division in fp32 (float64 stays float64),
the quotient is rounded to x's dtype, and only then multiplied by the weight, in that dtype. A kernel that multiplies
before it rounds differs in the last bit of bf16.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise the last axis, of width `dim`; `eps` keeps a row of zeros finite."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The normalised rows, in x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)

    def extra_repr(self) -> str:
        """Width and eps, as printed by the model's repr."""
        return f"{self.weight.numel()}, eps={self.eps}"
