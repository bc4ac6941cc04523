"""Multi-head attention (arXiv 1706.03762) and grouped-query attention (arXiv 2305.13245): the same module, with G = H
or G < H.

    q = RoPE(W_q x)  H x P     k = RoPE(W_k x)  G x P     v = W_v x  G x P     out = W_o concat_h attend(q, k, v)

The whole head is rotated. Under YaRN the softmax scale P^-0.5 grows by mscale squared, as in latent attention. A choice
of blocks may learn, see `dsv3.attention.select.learning` and, for a branch beside the selection, `pooled`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.attention import shapes
from dsv3.attention.attend import attend
from dsv3.attention.cache import LayerCache, key_value_heads
from dsv3.attention.pooled import joined, pooled
from dsv3.attention.select import Compared, Importance, leading, remember, select, taught, unfinished, weighed
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
        branches = isinstance(self.choice, Blocks) and self.choice.learns == "branch"
        self.gates = nn.Linear(width, 2 * self.heads, bias=False) if branches else None

    def forward(
        self, x: Float[Tensor, "B T D"], *, cache: LayerCache | None = None
    ) -> tuple[Float[Tensor, "B T D"], Selection | None]:
        """The layer's output for T new tokens, and which keys they saw (None: all).

        With a cache they follow its tokens, and are written to it.

        Raises:
            ValueError: for no token, or a cache that they do not fit.
        """
        shapes.check_axes("x", x, "batch", "positions", "width")
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
        key, value = memory["key"], memory["value"]
        if isinstance(self.choice, Blocks):
            selection = self._choose(self.choice, q if plain is None else plain, q, key, cache)
        else:
            selection = select(self.choice, x.shape, key.shape[2], memory.get("importance"), x.device)
        out = attend(q, key, value, selection, scale=self.scale)
        if self.gates is not None:
            assert isinstance(self.choice, Blocks), "only a choice of blocks has a branch"
            held = None if cache is None else cache.means
            branch = pooled(q, key, value, self.choice.block_k, scale=self.scale, held=held)
            out = joined(self.gates(x), branch, out)
        return self.o_proj(out.transpose(1, 2).flatten(2)), selection

    def _choose(
        self, choice: Blocks, compared: Tensor, q: Tensor, key: Tensor, cache: LayerCache | None
    ) -> Selection | None:
        """Which blocks the newest positions see; `compared` are their queries, as they are compared with keys."""
        total, start = key.shape[2], key.shape[2] - q.shape[2]
        leaders, first = compared[:, :, leading(choice, start)], unfinished(choice, start)
        keys = self._compared(choice, key[:, :, first:] if choice.scores else key[:, :, first:].detach(), first)
        held = None if cache is None else cache.index
        index = remember(choice, leaders.detach(), keys.detach(), start, total, held)
        selection = select(choice, (len(q), q.shape[2]), total, None, q.device, index=index, scale=self.scale)
        if (
            selection is None
            or not choice.scores
            or (choice.learns == "distilled" and (cache is not None or not self.training))
        ):
            return selection
        found = Compared.of(choice, leaders, keys) if cache is None else Compared.remembered(index, start)
        if choice.learns == "distilled":
            return taught(choice, selection, found, (q, key), self.scale)
        return weighed(choice, selection, found, total, self.scale)

    def _compared(self, choice: Blocks, key: Tensor, first: int) -> Tensor:
        """The keys from position `first` on, as they are, or as they were before they were rotated."""
        if choice.rotated:
            return key
        # a cache holds rotated keys alone; turned back on every path, they are the same bits on each
        backwards = -torch.arange(first, first + key.shape[2], device=key.device)
        frequency = torch.tensor(self.frequency, dtype=torch.float32, device=key.device)
        return rope.rotate(key, backwards, frequency, 1 / self.magnitude)

    def _split(self, x: Float[Tensor, "B T width"]) -> Float[Tensor, "B heads T P"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
