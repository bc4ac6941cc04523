"""The lightning indexer's scores, I(t, s) = sum_j w(t, j) ReLU(q(t, j) . k(s)), and the pieces they are computed in."""

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 2**22  # numbers held at once


def index_scores(
    q: Float[Tensor, "B n J W"], weight: Float[Tensor, "B n J"], k: Float[Tensor, "B m W"] | Float[Tensor, "B n m W"]
) -> Float[Tensor, "B n m"]:
    """I of n queries and m keys, the same for all of them or each query's own, in fp32 or wider."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        product = products(q.to(dtype), k.to(dtype)).relu_()
        return (weight.to(dtype)[:, :, None] @ product).squeeze(2)


def products(
    q: Float[Tensor, "*lead n heads W"], k: Float[Tensor, "*lead m W"] | Float[Tensor, "*lead n m W"]
) -> Float[Tensor, "*lead n heads m"]:
    """q . k of every head of n queries and m keys, which heads share."""
    if k.ndim == q.ndim:
        return q @ k.mT
    return (q.flatten(-3, -2) @ k.mT).unflatten(-2, q.shape[-3:-1])


def chunks(queries: int, per_query: int, *, first: int = 0) -> list[slice]:
    """The queries from `first` on, as many at a time as hold CHUNK numbers when each holds `per_query`."""
    step = max(1, CHUNK // per_query)
    return [slice(row, min(row + step, queries)) for row in range(first, queries, step)]
