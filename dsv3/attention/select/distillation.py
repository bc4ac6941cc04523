"""How an indexer learns: its scores follow attention's own weights (DeepSeek-V3.2, arXiv 2512.02556 section 2).

    p(t, s) = 1/H sum_h softmax_s(scale q(t, h) . k(s, h))           attention's weights, their sum over heads made 1
    loss    = mean_t sum_s p(t, s) log(p(t, s) / softmax_s I(t, s))  the KL divergence, in nats

over the keys that the query at t sees: all s <= t while the indexer warms up beside dense attention, afterwards those
that it selected; attention takes its softmax over the same. Attention is the teacher and gets no gradient, and the
indexer reads detached inputs, so neither disturbs the other.

A teacher of all queries would be T x S numbers per head. So queries come a few at a time, and the gradient is computed
with the loss: what is kept for backward is as large as the indexer's own queries and keys. The dense teacher takes T S
products all the same; over selected keys it takes T topk.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.attention.select.scores import chunks, index_scores, products
from dsv3.attention.selection import Selection


@torch.compiler.disable  # a loop over pieces of sizes that differ
def distillation(
    q: Float[Tensor, "B T J W"],
    weight: Float[Tensor, "B T J"],
    k: Float[Tensor, "B S W"],
    attended: tuple[Float[Tensor, "B H T P"], Float[Tensor, "B G S P"]],
    selection: Selection | None,
    *,
    scale: float,
) -> Float[Tensor, ""]:
    """The loss of an indexer's queries, weights and keys, for the last T of S positions.

    `attended` are the queries and keys of attention; `selection` lists for each token which it sees (None: all).
    """
    assert selection is None or selection.block_q == selection.block_k == 1, "a list of tokens per token is needed"
    seen = None if selection is None else (selection.indices[:, 0], selection.counts[:, 0])
    with torch.autocast(q.device.type, enabled=False):
        return _Distillation.apply(q, weight, k, *(x.detach() for x in attended), seen, scale)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        weight: Tensor,
        k: Tensor,
        main_q: Tensor,
        main_k: Tensor,
        seen: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> Tensor:
        kind = torch.promote_types(torch.promote_types(q.dtype, main_q.dtype), torch.float32)
        learning, ctx.dtypes = any(ctx.needs_input_grad), (q.dtype, weight.dtype, k.dtype)
        q, weight, k = (x.detach().to(kind) for x in (q, weight, k))
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, weight, k)]
        total, queries = k.new_zeros(()), q.shape[1]
        main_k = main_k if seen is None else main_k.contiguous()  # once, as its rows are taken piece by piece
        for rows in chunks(queries, _numbers_per_query(q, k, main_q, main_k, seen)):
            place, visible = _visible(rows, k.shape[1] - queries, seen, k.device)
            target = _weights(main_q[:, :, rows].to(kind), _take(main_k, place).to(kind), visible, scale)
            with torch.set_grad_enabled(learning):
                leaves = [x.detach().requires_grad_(learning) for x in (q[:, rows], weight[:, rows], k)]
                score = index_scores(leaves[0], leaves[1], _take(leaves[2], place))
                part = divergence(score, target, visible).sum() / (len(q) * queries)
            total += part.detach()
            if learning:
                part_q, part_weight, part_k = torch.autograd.grad(part, leaves)
                grads[0][:, rows], grads[1][:, rows] = part_q, part_weight
                grads[2] += part_k
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # multiplied first: without the loss scale that is in grad, fp16 would round them to 0
        parts = (kept * grad for kept in ctx.saved_tensors)
        return (*(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)), None, None, None, None)


def _numbers_per_query(q: Tensor, k: Tensor, main_q: Tensor, main_k: Tensor, seen: tuple[Tensor, Tensor] | None) -> int:
    """What a query holds at most: a product per key and head, and its own keys, where they are its own."""
    batch, _, heads, width = q.shape
    each = heads + main_q.shape[1]
    if seen is None:
        return batch * k.shape[1] * each
    return batch * seen[0].shape[-1] * (each + width + main_k.shape[1] * main_k.shape[-1])


def _visible(
    rows: slice, before: int, seen: tuple[Tensor, Tensor] | None, device: torch.device
) -> tuple[Int[Tensor, "B n m"] | slice, Bool[Tensor, "b n m"]]:
    """The keys of some queries, theirs in common or each query's own, and which of them it sees."""
    if seen is None:
        position = torch.arange(before + rows.stop, device=device)
        return slice(before + rows.stop), (position <= position[before + rows.start :, None])[None]
    place, count = (x[:, rows] for x in seen)
    return place, torch.arange(place.shape[-1], device=device) < count[..., None]


def _take(x: Float[Tensor, "B *heads S W"], place: Tensor | slice) -> Float[Tensor, "B ... W"]:
    """The keys at a place: of all queries, or [B, *heads, n, m, W] each query's own."""
    if isinstance(place, slice):
        return x[..., place, :]
    # whole rows are copied, and in backward added: `gather` would look up each number of them
    lead, rows = x.shape[:-2], x.shape[-2]
    first = torch.arange(lead.numel(), device=x.device).view(*lead, 1, 1) * rows
    row = place.view(len(x), *[1] * (x.ndim - 3), *place.shape[1:]) + first
    return x.reshape(-1, x.shape[-1]).index_select(0, row.flatten()).view(*row.shape, x.shape[-1])


def _weights(
    q: Float[Tensor, "B H n P"], k: Tensor, visible: Bool[Tensor, "b n m"], scale: float
) -> Float[Tensor, "B n m"]:
    """Attention's weights, averaged over heads; k [B, G, m, P], or [B, G, n, m, P]."""
    logit = products(q.unflatten(1, (k.shape[1], -1)).transpose(2, 3), k) * scale
    return logit.masked_fill_(~visible[:, None, :, None], float("-inf")).softmax(dim=-1).mean(dim=(1, 3))


def divergence(
    score: Float[Tensor, "*lead n m"], target: Float[Tensor, "*lead n m"], visible: Bool[Tensor, "*seen n m"]
) -> Float[Tensor, "*lead n m"]:
    """p log(p / softmax(score)), whose sum it is; what is not visible has p = 0 and no part."""
    log = score.masked_fill(~visible, float("-inf")).log_softmax(dim=-1).masked_fill(~visible, 0)
    return torch.xlogy(target, target) - target * log
