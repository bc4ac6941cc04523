"""Multi-head attention (arXiv 1706.03762) and grouped-query attention (arXiv 2305.13245): the same module, with G = H
or G < H.

    q = RoPE(W_q x)  H x P     k = RoPE(W_k x)  G x P     v = W_v x  G x P     out = W_o concat_h attend(q, k, v)

The whole head is rotated. Under YaRN the softmax scale P^-0.5 grows by mscale squared, as in latent attention.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.attention.attend import attend
from dsv3.attention.cache import LayerCache, key_value_heads
from dsv3.attention.select import Importance, Index, leading, remember, select, unfinished
from dsv3.attention.selection import Selection
from dsv3.config import Blocks, Latent, Model, PerHead
from dsv3.layers import rope


class MultiHeadAttention(nn.Module):
    """`num_attention_heads` queries over as many, or over `num_key_value_heads`, keys and values."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        attention = model.attention
        assert not isinstance(attention, Latent), "latent attention has a module of its own"
        self.heads, self.groups, self.head_dim = (
            attention.num_attention_heads,
            key_value_heads(attention),
            attention.head_dim,
        )
        self.choice = attention.select
        self.scale = self.head_dim**-0.5 * rope.softmax_mscale(model.rope)
        # a tuple, not a buffer: a model made on the meta device has no buffers to fill afterwards
        self.frequency = tuple(rope.frequencies(self.head_dim, model.rope).tolist())
        self.magnitude = rope.magnitude(model.rope)
        width = model.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.importance = Importance(width, self.heads) if isinstance(self.choice, PerHead) else None

    def forward(
        self, x: Float[Tensor, "B T D"], *, cache: LayerCache | None = None
    ) -> tuple[Float[Tensor, "B T D"], Selection | None]:
        """The layer's output for T new tokens, and which keys they saw (None: all).

        With a cache they follow its tokens, and are written to it.
        """
        start = 0 if cache is None else cache.length
        position_T = torch.arange(start, start + x.shape[1], device=x.device)
        frequency = torch.tensor(self.frequency, dtype=torch.float32, device=x.device)
        q = self._split(self.q_proj(x))
        plain = q if isinstance(self.choice, Blocks) and not self.choice.rotated else None
        q = rope.rotate(q, position_T, frequency, self.magnitude)
        k = rope.rotate(self._split(self.k_proj(x)), position_T, frequency, self.magnitude)
        memory = {"key": k, "value": self._split(self.v_proj(x))}
        if self.importance is not None:
            memory["importance"] = self.importance(x)
        if cache is not None:
            memory = cache.append(**memory)
        key, added = memory["key"], memory.get("importance")
        index = None
        if isinstance(self.choice, Blocks):
            compared, held = q if plain is None else plain, None if cache is None else cache.index
            index = self._remember(self.choice, compared, key, start, held)
        selection = select(self.choice, x.shape, key.shape[2], added, x.device, index=index, scale=self.scale)
        out = attend(q, key, memory["value"], selection, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2)), selection

    def _remember(self, choice: Blocks, q: Tensor, key: Tensor, start: int, held: Index | None) -> Index:
        """The index of queries and keys, as they are, or as they were before they were rotated."""
        total, first = key.shape[2], unfinished(choice, start)
        key = key[:, :, first:].detach()
        if not choice.rotated:
            # a cache holds rotated keys alone; turned back on every path, they are the same bits on each
            backwards = -torch.arange(first, total, device=key.device)
            frequency = torch.tensor(self.frequency, dtype=torch.float32, device=key.device)
            key = rope.rotate(key, backwards, frequency, 1 / self.magnitude)
        return remember(choice, q.detach()[:, :, leading(choice, start)], key, start, total, held)

    def _split(self, x: Float[Tensor, "B T width"]) -> Float[Tensor, "B heads T P"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
