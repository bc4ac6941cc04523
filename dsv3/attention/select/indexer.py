"""The lightning indexer of DeepSeek-V3.2's sparse attention (arXiv 2512.02556 section 2): each token sees the keys that
small heads of their own score highest, the same ones in all heads of the attention.

    q(t, j) = W_qb c_q(t)  J x W          k(s) = LayerNorm(W_k x(s))  W, one for all J heads
    w(t)    = W_w x(t) / sqrt(J W)        I(t, s) = sum_j w(t, j) ReLU(q(t, j) . k(s))
    token t sees the `index_topk` best s <= t by I, or all of them while there are no more

c_q is attention's normalised query latent. The first `qk_rope_head_dim` numbers of a query and a key are rotated, in
halves: (i, i + half) are a pair, where attention itself rotates neighbours and the last numbers of a head. LayerNorm
has a bias and eps 1e-6. Scores are computed in fp32 or wider, and ties go to the earlier token. A token with at most
`index_topk` keys before it leaves none out, so nothing is scored for it: the last T of S positions cost the sum of
t + 1 over their t >= index_topk, quadratic still, but cheaper per pair than attention.

A choice has no gradient; the indexer learns by a loss of its own, see `distillation`, in two stages: "warmup", in which
attention is dense and the indexer alone learns, then "sparse".

DeepSeek's inference code also multiplies q and k with a Hadamard matrix, which no product notices, so that they lose
less in fp8; neither is done here. transformers takes w in the weights' own type, where DeepSeek and this take fp32; its
indexer has no gradient, so that training leaves it as it was; and it attends to everything under a mask. Both leave
open which of equal scores they take.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dsv3.attention.select.best import best
from dsv3.attention.select.distillation import distillation
from dsv3.attention.select.scores import chunks, index_scores
from dsv3.attention.select.window import clipped_sum
from dsv3.attention.selection import Selection, SelectionCost
from dsv3.config import Indexer, Latent, Model
from dsv3.config.rules import require
from dsv3.layers import rope

EPS = 1e-6


class LightningIndexer(nn.Module):
    """The indexer of one latent attention; its weights carry the names of the published checkpoints."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        attention = model.attention
        assert isinstance(attention, Latent), "only latent attention has an indexer"
        assert isinstance(attention.select, Indexer), "other selectors are no modules"
        assert attention.q_lora_rank is not None, "the indexer reads the query latent"
        self.choice, self.rotated = attention.select, attention.qk_rope_head_dim
        # a tuple, not a buffer: a model made on the meta device has no buffers to fill afterwards
        self.frequency = tuple(rope.frequencies(self.rotated, model.rope).tolist())
        self.magnitude = rope.magnitude(model.rope)
        heads, width = self.choice.index_n_heads, self.choice.index_head_dim
        self.wq_b = nn.Linear(attention.q_lora_rank, heads * width, bias=False)
        self.wk = nn.Linear(model.hidden_size, width, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=EPS)
        self.weights_proj = nn.Linear(model.hidden_size, heads, bias=False)

    def query(self, c_q: Float[Tensor, "B T R"], position: Int[Tensor, " T"]) -> Float[Tensor, "B T J W"]:
        """The queries of tokens, from attention's query latents."""
        q = self.wq_b(c_q.detach()).unflatten(-1, (-1, self.choice.index_head_dim))
        return self._turned(q.transpose(1, 2), position).transpose(1, 2)

    def key(self, x: Float[Tensor, "B T D"], position: Int[Tensor, " T"]) -> Float[Tensor, "B T W"]:
        """What a cache holds of each token."""
        return self._turned(self.k_norm(self.wk(x.detach())), position)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        q: Float[Tensor, "B T J W"],
        k: Float[Tensor, "B S W"],
        attended: tuple[Float[Tensor, "B H T P"], Float[Tensor, "B G S P"]] | None = None,
        *,
        scale: float = 1.0,
    ) -> Selection:
        """What tokens x with queries q, the last T of S, see; with the loss where attention's own queries and keys, and
        the scale of its softmax, are there to learn from.
        """
        weight, total = self._weight(x.detach()), k.shape[1]
        if self.prunes(total):
            seen = selection = indexer(q, weight, k, topk=self.choice.index_topk)
        else:
            seen, selection = None, everything(len(x), x.shape[1], total, x.device)
        if attended is None:
            return selection
        return replace(selection, loss=distillation(q, weight, k, attended, seen, scale=scale))

    def prunes(self, total: int) -> bool:
        """Whether any of `total` tokens sees less than all before it."""
        return self.choice.stage == "sparse" and total > self.choice.index_topk

    def _weight(self, x: Tensor) -> Float[Tensor, "B T J"]:
        """The weight of each head, in fp32 or wider, as a router's logits are."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            weight = F.linear(x.to(dtype), self.weights_proj.weight.to(dtype))
        return weight * (self.choice.index_n_heads * self.choice.index_head_dim) ** -0.5

    def _turned(self, x: Float[Tensor, "*batch T W"], position: Tensor) -> Float[Tensor, "*batch T W"]:
        frequency = torch.tensor(self.frequency, dtype=torch.float32, device=x.device)
        turned, plain = x.split((self.rotated, x.shape[-1] - self.rotated), dim=-1)
        return torch.cat((rope.rotate_halves(turned, position, frequency, self.magnitude), plain), dim=-1)


@torch.compiler.disable  # integers, and a loop over chunks of sizes that differ
@torch.no_grad()
def indexer(
    q: Float[Tensor, "B T J W"], weight: Float[Tensor, "B T J"], k: Float[Tensor, "B S W"], *, topk: int
) -> Selection:
    """The `topk` best keys of each of the last T of S positions.

    Raises:
        ValueError: for shapes that do not fit each other, a topk below 1, or no query.
    """
    shapes = tuple(q.shape), tuple(weight.shape), tuple(k.shape)
    name, wanted = "(q.shape, weight.shape, k.shape)", "[B,T,J,W], [B,T,J] and [B,S,W]"
    fits = q.ndim == 4 and weight.shape == q.shape[:3] and k.ndim == 3 and k.shape[::2] == q.shape[::3]
    require(fits, name, shapes, "batch, queries, heads and widths must agree", f"pass {wanted}")
    (batch, queries), total = q.shape[:2], k.shape[1]
    require(1 <= queries <= total, "queries", queries, f"must be between 1 and S={total}", "select for some tokens")
    require(topk >= 1, "topk", topk, "must be at least 1: a token attends to something", "see more keys")
    require(q.numel() > 0, name, shapes, "must not be empty", "make each axis at least 1")
    if total <= topk:
        return everything(batch, queries, total, q.device)
    start = total - queries
    indices = torch.arange(topk, device=q.device).repeat(batch, 1, queries, 1)
    computed = 0
    for rows in chunks(queries, batch * q.shape[2] * total, first=max(topk - start, 0)):
        seen = start + rows.stop
        score = index_scores(q[:, rows], weight[:, rows], k[:, :seen])
        computed += score.numel()
        indices[:, 0, rows] = _best(score, topk)
    scored = _up_to(total) - _up_to(max(start, topk))
    kept = clipped_sum(start + 1, total, topk)
    return Selection(
        indices=indices,
        counts=torch.arange(start + 1, total + 1, device=q.device).clamp(max=topk).expand(batch, 1, -1),
        block_q=1,
        block_k=1,
        cost=SelectionCost(scored=batch * scored, kept=batch * kept, per_level=(batch * scored,), computed=computed),
    )


def everything(batch: int, queries: int, total: int, device: torch.device) -> Selection:
    """All keys up to each query's own, as one block of each."""
    return Selection(
        indices=torch.zeros(batch, 1, 1, 1, dtype=torch.int64, device=device),
        counts=torch.ones(batch, 1, 1, dtype=torch.int64, device=device),
        block_q=queries,
        block_k=total,
        cost=SelectionCost(scored=0, kept=batch * (_up_to(total) - _up_to(total - queries)), per_level=(0,)),
    )


def _best(score: Float[Tensor, "B n m"], topk: int) -> Int[Tensor, "B n K"]:
    """The best of what each row may see, ascending; the last row sees all m. What is not a number comes last."""
    rows, seen = score.shape[1:]
    later = torch.ones(rows, seen, dtype=torch.bool, device=score.device).triu(seen - rows + 1)
    score = torch.where(score > float("-inf"), score, torch.finfo(score.dtype).min)
    score = score.masked_fill(later, float("-inf")).flatten(0, 1)
    place, _ = best(score, torch.full((len(score),), topk, device=score.device))
    return place.sort(dim=1).values.view(-1, rows, topk)


def _up_to(n: int) -> int:
    return n * (n + 1) // 2
