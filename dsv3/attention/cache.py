"""The cache of a decoder: what attention must remember of past tokens, in buffers allocated once.

    MultiHead, Grouped   key [B,G,M,P] and value [B,G,M,P] per layer
    Latent               latent [B,M,L+P]: the normalised latent, then the rotated rotary key; nothing per head
    with PerHead         importance [B,M,H] besides
    with Indexer         index_key [B,M,W] besides
    with Blocks, Hierarchical   besides, an index: the query of each block's first token, summaries of key blocks, and
                         what the newest block of queries chose
    with a branch besides   the means of keys and of values of each block, [B,G,M/block_k,P] each

M is `max_length`; the latent is that of arXiv 2405.04434 section 2.1.2. A forward pass writes its tokens behind the
`length` already there, in place; the new length is a new value (`advance`), so that the same buffers can be continued
from an earlier point. What is written is detached: a cache is for inference.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv3.attention.select.index import Index
from dsv3.config import Attention, Blocks, Grouped, Indexer, Latent, Model, MultiHead, PerHead
from dsv3.config.rules import require


@dataclass(frozen=True)
class LayerCache:
    """One layer's buffers, each with positions on the last axis but one, and how many positions are filled.

    The index of a choice by content and the means of a branch are continued in place by the layer that uses them.
    """

    buffers: dict[str, Tensor]
    length: int
    index: Index | None = None
    means: tuple[Tensor, Tensor] | None = None

    def append(self, **new: Tensor) -> dict[str, Tensor]:
        """Write the new positions behind the filled ones; returns each buffer up to and including them.

        Raises:
            ValueError: when they do not fit, or belong to another number of sequences.
        """
        assert new.keys() == self.buffers.keys(), f"this layer caches {list(self.buffers)}, not {list(new)}"
        filled = {}
        for name, rows in new.items():
            buffer = self.buffers[name]
            stop = self.length + rows.shape[-2]
            _check_room(buffer, rows, stop)
            buffer[..., self.length : stop, :] = rows.detach()
            filled[name] = buffer[..., :stop, :]
        return filled


@dataclass(frozen=True)
class KeyValueCache:
    """The layers' caches of one batch of sequences; all layers hold the same number of positions."""

    layers: tuple[LayerCache, ...]
    max_length: int

    @classmethod
    def empty(
        cls,
        model: Model,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KeyValueCache":
        """Buffers for `batch` sequences of up to `max_length` tokens, nothing in them yet.

        Raises:
            ValueError: when batch or max_length is below 1, or max_length above what the model's positions allow.
        """
        require(batch >= 1, "batch", batch, "must be at least 1", "cache at least one sequence")
        most = model.max_position_embeddings
        rule = f"must be between 1 and max_position_embeddings={most}"
        require(1 <= max_length <= most, "max_length", max_length, rule, "choose a length inside that range")
        shapes = _shapes(model.attention, batch, max_length)

        def layer() -> LayerCache:
            buffers = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
            index = _index(model.attention, batch, max_length, dtype, device)
            return LayerCache(buffers, 0, index, _means(model.attention, buffers, max_length))

        return cls(tuple(layer() for _ in range(model.num_hidden_layers)), max_length)

    @property
    def length(self) -> int:
        """Positions filled so far."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        held = sum(buffer.nbytes for layer in self.layers for buffer in (*layer.buffers.values(), *(layer.means or ())))
        return held + sum(layer.index.nbytes for layer in self.layers if layer.index is not None)

    def advance(self, tokens: int) -> "KeyValueCache":
        """The same buffers, counted `tokens` positions longer: what a model returns after every layer wrote them."""
        return replace(self, layers=tuple(replace(layer, length=layer.length + tokens) for layer in self.layers))


def _shapes(attention: Attention, batch: int, max_length: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]]
    match attention:
        case Latent():
            width = attention.kv_lora_rank + attention.qk_rope_head_dim
            shapes = {"latent": (batch, max_length, width)}
        case Grouped() | MultiHead():
            heads = key_value_heads(attention)
            shape = (batch, heads, max_length, attention.head_dim)
            shapes = {"key": shape, "value": shape}
    if isinstance(attention.select, PerHead):
        shapes["importance"] = (batch, max_length, attention.num_attention_heads)
    if isinstance(attention.select, Indexer):
        shapes["index_key"] = (batch, max_length, attention.select.index_head_dim)
    return shapes


def _index(
    attention: Attention, batch: int, max_length: int, dtype: torch.dtype, device: torch.device | str
) -> Index | None:
    if not isinstance(attention.select, Blocks):
        return None
    match attention:
        case Latent():
            # queries in the latent's space, where all heads share a key; before rotation the rotary key is left out
            rope = attention.qk_rope_head_dim if attention.select.rotated else 0
            groups, width = 1, attention.kv_lora_rank + rope
        case Grouped() | MultiHead():
            groups, width = key_value_heads(attention), attention.head_dim
    size = (batch, attention.num_attention_heads, groups, width)
    return Index.empty(attention.select, size, max_length, dtype, device)


def _means(attention: Attention, buffers: dict[str, Tensor], max_length: int) -> tuple[Tensor, Tensor] | None:
    if not isinstance(attention.select, Blocks) or attention.select.learns != "branch":
        return None
    blocks = max_length // attention.select.block_k
    return torch.zeros_like(buffers["key"][:, :, :blocks]), torch.zeros_like(buffers["value"][:, :, :blocks])


def key_value_heads(attention: MultiHead | Grouped) -> int:
    """How many heads of keys and values there are: all, or one per group."""
    return attention.num_key_value_heads if isinstance(attention, Grouped) else attention.num_attention_heads


def _check_room(buffer: Tensor, rows: Tensor, stop: int) -> None:
    room, batch = buffer.shape[-2], buffer.shape[0]
    require(stop <= room, "length", stop, f"must be at most the cache's max_length={room}", "allocate a longer cache")
    require(rows.shape[0] == batch, "batch", rows.shape[0], f"must be the cache's {batch}", "use a cache of that batch")
