"""torch's fused attention on one block, forward and backward apart, so that a loop over blocks keeps no graph.

    out = softmax(scale * q k^T + penalty) v          lse = the logarithm of each row's softmax denominator

On a CPU backward starts from `lse` and repeats no forward: the operators behind scaled_dot_product_attention are called
by name, since torch's public function keeps lse to itself. Elsewhere backward runs the public function once more.
Widths of q, k and v must be equal: see `same_width`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def forward(
    q: Float[Tensor, "B H C P"],
    k: Float[Tensor, "B H n P"],
    v: Float[Tensor, "B H n P"],
    penalty: Float[Tensor, "B h #C n"],
    scale: float,
) -> tuple[Float[Tensor, "B H C P"], Float[Tensor, "B H C"] | None]:
    """The output, and lse where backward will want it."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=penalty.to(q.dtype), scale=scale), None
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operator(q, k, v, attn_mask=penalty, scale=scale)


def backward(
    grad: Float[Tensor, "B H C P"],
    q: Float[Tensor, "B H C P"],
    k: Float[Tensor, "B H n P"],
    v: Float[Tensor, "B H n P"],
    penalty: Float[Tensor, "B h #C n"],
    scale: float,
    out: Float[Tensor, "B H C P"],
    lse: Float[Tensor, "B H C"],
) -> tuple[Float[Tensor, "B H C P"], Float[Tensor, "B H n P"], Float[Tensor, "B H n P"]]:
    """The gradients of q, k and v; lse is read on a CPU only."""
    if q.device.type == "cpu":
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return operator(grad, q, k, v, out, lse, 0.0, False, attn_mask=penalty, scale=scale)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        again = F.scaled_dot_product_attention(q, k, v, attn_mask=penalty.to(q.dtype), scale=scale)
    grad_q, grad_k, grad_v = torch.autograd.grad(again, (q, k, v), grad)
    return grad_q, grad_k, grad_v
