"""Multi-head latent attention, MLA (arXiv 2405.04434 section 2.1; arXiv 2412.19437 section 2.1.1).

    c_q = RMS(W_qa x)                   [q_n ; q_r] = W_qb c_q  per head        q_r = RoPE(q_r)
    [c ; k_r] = W_kva x   c = RMS(c)    [k_n ; v]   = W_kvb c   per head        k_r = RoPE(k_r), one for all heads
    logit(t, s) = scale * (q_n . k_n(s) + q_r . k_r(s))        scale = (nope + rope)^-0.5 * mscale^2

Expanded, as in training and prefill: keys and values of every head are made from the latent, and attention is
multi-head. Absorbed, as in decoding: with W_kvb = [W_uk ; W_uv] per head, q_n . W_uk c = (W_uk^T q_n) . c, so queries
move to the latent's space, where all heads share one key, [c ; k_r], and one value, c; outputs come back through W_uv.
Equal to rounding. The absorbed form costs more per pair, (2L + rope) against (nope + rope + R), and reads H times less
per key. Both layernorms use eps 1e-6 whatever rms_norm_eps is: so do the published readers.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.attention import shapes
from dsv3.attention.attend import attend
from dsv3.attention.cache import LayerCache
from dsv3.attention.select import Importance, Index, LightningIndexer, leading, remember, select, unfinished
from dsv3.attention.selection import Selection
from dsv3.config import Blocks, Indexer, Latent, Model, PerHead
from dsv3.layers import RMSNorm, rope

LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """MLA; its weights carry the names of the published checkpoints."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        attention = model.attention
        assert isinstance(attention, Latent), "other attention has a module of its own"
        self.shape = attention
        self.scale = attention.qk_head_dim**-0.5 * rope.softmax_mscale(model.rope)
        # a tuple, not a buffer: a model made on the meta device has no buffers to fill afterwards
        self.frequency = tuple(rope.frequencies(attention.qk_rope_head_dim, model.rope).tolist())
        self.magnitude = rope.magnitude(model.rope)
        width, heads, rank = model.hidden_size, attention.num_attention_heads, attention.q_lora_rank
        if rank is None:
            self.q_proj = nn.Linear(width, heads * attention.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, rank, bias=False)
            self.q_a_layernorm = RMSNorm(rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(rank, heads * attention.qk_head_dim, bias=False)
        latent = attention.kv_lora_rank
        self.kv_a_proj_with_mqa = nn.Linear(width, latent + attention.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(latent, LATENT_EPS)
        self.kv_b_proj = nn.Linear(latent, heads * (attention.qk_nope_head_dim + attention.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * attention.v_head_dim, width, bias=False)
        self.importance = Importance(width, heads) if isinstance(attention.select, PerHead) else None
        self.indexer = LightningIndexer(model) if isinstance(attention.select, Indexer) else None

    def forward(
        self, x: Float[Tensor, "B T D"], *, cache: LayerCache | None = None, absorbed: bool | None = None
    ) -> tuple[Float[Tensor, "B T D"], Selection | None]:
        """The layer's output for T new tokens, and which keys they saw (None: all).

        With a cache they follow its tokens, and are written to it. `absorbed` picks the form; None takes the absorbed
        one for a single token after a cache, the expanded one otherwise.

        Raises:
            ValueError: for no token, or a cache that they do not fit.
        """
        shapes.check_axes("x", x, "batch", "positions", "width")
        start = 0 if cache is None else cache.length
        position_T = torch.arange(start, start + x.shape[1], device=x.device)
        q_nope, q_rope, q_index = self._query(x, position_T)
        memory = self._memory(x, position_T)
        if cache is not None:
            memory = cache.append(**memory)
        if absorbed is None:
            absorbed = cache is not None and x.shape[1] == 1
        up = self._up() if absorbed else None
        if up is None:
            q, k, v = self._expanded(q_nope, q_rope, memory["latent"])
        else:
            q, k, v = self._absorbed(q_nope, q_rope, memory["latent"], up[0])
        if self.indexer is not None:
            learns = self.training and cache is None and self.indexer.choice.loss_weight > 0
            selection: Selection | None = self.indexer(
                x, q_index, memory["index_key"], (q, k) if learns else None, scale=self.scale
            )
            seen = selection if self.indexer.prunes(k.shape[2]) else None
        else:
            seen = selection = self._select(x, q_nope, q_rope, memory, None if cache is None else cache.index)
        out = attend(q, k, v, seen, scale=self.scale)
        if up is not None:
            out = torch.einsum("bhtl,hrl->bhtr", out[..., : self.shape.kv_lora_rank], up[1])
        return self.o_proj(out.transpose(1, 2).flatten(2)), selection

    def _memory(self, x: Tensor, position: Tensor) -> dict[str, Tensor]:
        """What is remembered of new tokens, by the names of a cache's buffers."""
        memory = {"latent": self._latent(x, position)}
        if self.importance is not None:
            memory["importance"] = self.importance(x)
        if self.indexer is not None:
            memory["index_key"] = self.indexer.key(x, position)
        return memory

    def _select(
        self, x: Tensor, q_nope: Tensor, q_rope: Tensor, memory: dict[str, Tensor], held: Index | None
    ) -> Selection | None:
        choice, latent, index = self.shape.select, memory["latent"], None
        if isinstance(choice, Blocks):
            index = self._remember(choice, q_nope, q_rope, latent, latent.shape[1] - x.shape[1], held)
        importance = memory.get("importance")
        return select(choice, x.shape, latent.shape[1], importance, x.device, index=index, scale=self.scale)

    @torch.no_grad()
    def _remember(
        self, choice: Blocks, q_nope: Tensor, q_rope: Tensor, latent: Tensor, start: int, held: Index | None
    ) -> Index:
        """The index in the latent's space, whatever the form: there all heads share one key, [c ; k_r], or c alone."""
        rows, total = leading(choice, start), latent.shape[1]
        key = latent[:, None, unfinished(choice, start) :]
        w_uk = self._up()[0]
        query = torch.einsum("bhtn,hnl->bhtl", q_nope[:, :, rows], w_uk)
        if choice.rotated:
            query = torch.cat((query, q_rope[:, :, rows]), dim=-1)
        else:
            key = key[..., : self.shape.kv_lora_rank]
        return remember(choice, query, key, start, total, held)

    def _up(self) -> tuple[Tensor, ...]:
        """W_uk and W_uv of every head."""
        heads, nope, width = self.shape.num_attention_heads, self.shape.qk_nope_head_dim, self.shape.v_head_dim
        return self.kv_b_proj.weight.unflatten(0, (heads, nope + width)).split((nope, width), dim=1)

    def _query(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each head's query, without position and rotated, and the indexer's queries, where there is one."""
        straight = self.shape.q_lora_rank is None
        c_q = x if straight else self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_proj(c_q) if straight else self.q_b_proj(c_q)
        q = q.unflatten(-1, (-1, self.shape.qk_head_dim)).transpose(1, 2)
        nope, turned = q.split((self.shape.qk_nope_head_dim, self.shape.qk_rope_head_dim), dim=-1)
        return nope, self._rotate(turned, position), None if self.indexer is None else self.indexer.query(c_q, position)

    def _latent(self, x: Tensor, position: Tensor) -> Float[Tensor, "B T width"]:
        """What the cache holds: the normalised latent, then the rotated key that all heads share."""
        compressed = self.kv_a_proj_with_mqa(x)
        latent, k_rope = compressed.split((self.shape.kv_lora_rank, self.shape.qk_rope_head_dim), dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), self._rotate(k_rope, position)), dim=-1)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        frequency = torch.tensor(self.frequency, dtype=torch.float32, device=x.device)
        return rope.rotate(x, position, frequency, self.magnitude)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head."""
        latent, k_rope = memory.split((self.shape.kv_lora_rank, self.shape.qk_rope_head_dim), dim=-1)
        heads, nope, width = self.shape.num_attention_heads, self.shape.qk_nope_head_dim, self.shape.v_head_dim
        expanded = self.kv_b_proj(latent).unflatten(-1, (heads, nope + width)).transpose(1, 2)
        k_nope, v = expanded.split((nope, width), dim=-1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, heads, -1, -1)), dim=-1)
        return torch.cat((q_nope, q_rope), dim=-1), k, v

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, w_uk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries in the latent's space, and the key and value that all heads share there."""
        q = torch.cat((torch.einsum("bhtn,hnl->bhtl", q_nope, w_uk), q_rope), dim=-1)
        shared = memory[:, None]
        # all of [latent ; rotary key] stands in for the value: cutting the output is cheaper than copying latents out
        return q, shared, shared
