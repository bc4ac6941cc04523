"""Dense causal attention: every key up to the query's own position.

    out_t = sum_{j <= t} softmax_j(scale * q_t . k_j) v_j

`dense` uses torch's fused kernels and never holds a T x S matrix; `eager` writes the matrix out, as the textbook does,
and is the arm that fused kernels are measured against. Grouped-query heads share keys without copies: query head i
reads key-value head i // (H/G).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK = 512  # rows of the explicit mask when queries continue a longer sequence


def dense(
    q: Float[Tensor, "B H T P"], k: Float[Tensor, "B G S P"], v: Float[Tensor, "B G S R"], *, scale: float
) -> Float[Tensor, "B H T R"]:
    """Attention of the last T of S positions to all positions up to their own."""
    length, width = q.shape[2], v.shape[-1]
    q, k, v = same_width(q, k, v)
    if length == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    elif length == 1:
        out = _one_query(q, k, v, scale)
    else:
        out = _continued(q, k, v, scale)
    return out[..., :width]


def eager(
    q: Float[Tensor, "B H T P"], k: Float[Tensor, "B G S P"], v: Float[Tensor, "B G S R"], *, scale: float
) -> Float[Tensor, "B H T R"]:
    """The same attention with the matrix of weights written out: T x S numbers per head."""
    (batch, heads, length, _), (groups, total) = q.shape, k.shape[1:3]
    score = torch.einsum("bgatp,bgsp->bgats", q.unflatten(1, (groups, -1)), k) * scale
    later = torch.ones(length, total, dtype=torch.bool, device=q.device).triu(total - length + 1)
    weight = score.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("bgats,bgsr->bgatr", weight, v).reshape(batch, heads, length, v.shape[-1])


def same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad with zeros to one width on a CPU, whose fused kernel asks for it; its other form holds the T x S matrix."""
    missing = k.shape[-1] - v.shape[-1]
    if q.device.type != "cpu" or missing == 0:
        return q, k, v
    if missing > 0:
        return q, k, F.pad(v, (0, missing))
    return F.pad(q, (0, -missing)), F.pad(k, (0, -missing)), v


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A single query sees everything: the heads of a group become rows of one matrix, so that keys are read once."""
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(*q.shape[:-1], v.shape[-1])


def _continued(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """T < S: fused kernels align a causal mask with the first key, so blocks of queries bring their own."""
    before = k.shape[2] - q.shape[2]
    position = torch.arange(k.shape[2], device=q.device)
    gqa = q.shape[1] != k.shape[1]
    blocks = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[2])
        seen = before + stop
        mask = position[:seen] <= position[before + start : seen, None]
        part = F.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale, enable_gqa=gqa
        )
        blocks.append(part)
    return torch.cat(blocks, dim=2)
