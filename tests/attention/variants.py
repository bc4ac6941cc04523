"""One attention per choice that changes what it computes; the contract holds for each of them."""

from dataclasses import replace

import torch
from torch import nn

from dsv3.attention import Selection, build, reference
from dsv3.attention.select import leading, per_head, remember, window
from dsv3.attention.select import reference as by_content
from dsv3.attention.select import select as selection_of
from dsv3.config import (
    Attention,
    Auto,
    Blocks,
    Everything,
    Grouped,
    Hierarchical,
    Indexer,
    Latent,
    Model,
    MultiHead,
    PerHead,
    Rope,
    Select,
    Window,
    Yarn,
    vary,
)

LATENT = Latent(
    num_attention_heads=4, q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
)
ATTENTIONS: dict[str, Attention] = {
    "multi_head": MultiHead(num_attention_heads=4, head_dim=6),
    "grouped": Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=6),
    "latent": LATENT,
    "latent_plain_queries": vary(LATENT, q_lora_rank=None, v_head_dim=12),
}
SELECTS: dict[str, Select] = {
    "everything": Everything(),
    "window": Window(size=5),
    "window_sink": Window(size=4, sink=3),
    "per_head_share": PerHead(keep=0.3),
    "per_head_number": PerHead(k=5),
    "blocks": Blocks(keep=0.7, top_p=0.8, block_q=4, block_k=2, sharing="group", rotated=False),
    "beam": Hierarchical(k=7, block_q=8, block_k=2, branching=2),
    "best_first": Hierarchical(k=4, block_q=4, block_k=4, branching=2, search="best_first", sharing="all"),
    "auto": Auto(k=6, block_q=4, block_k=2, branching=2, crossover=24),
}
YARN = Rope(scaling=Yarn(factor=8.0, original_max_position_embeddings=32))


def config(attention: Attention, select: Select, rope: Rope = YARN) -> Model:
    return Model(
        vocab_size=8,
        hidden_size=20,
        num_hidden_layers=1,
        intermediate_size=8,
        attention=vary(attention, select=select),
        rope=rope,
        max_position_embeddings=1024,
    )


VARIANTS = {
    f"{attention}-{select}": config(ATTENTIONS[attention], SELECTS[select])
    for attention in ATTENTIONS
    for select in SELECTS
}
INDEXER = Indexer(index_n_heads=3, index_head_dim=6, index_topk=5)  # few heads: scores of 0, all alike, are common
VARIANTS["latent-indexer"] = config(LATENT, INDEXER)
VARIANTS["latent-indexer_warmup"] = config(LATENT, vary(INDEXER, stage="warmup"))
LEARNING: dict[str, Blocks] = {
    "branch": Hierarchical(k=4, block_q=4, block_k=4, branching=2, search="best_first", sharing="all", learns="branch"),
    "distilled": Blocks(k=6, block_q=4, block_k=2, sharing="group", learns="distilled"),
    "distilled_per_token": Hierarchical(k=4, block_q=1, block_k=2, branching=2, sharing="all", learns="distilled"),
    "gated": Hierarchical(k=7, block_q=4, block_k=2, branching=2, rotated=False, learns="gated"),
    "gated_per_token": Blocks(keep=0.6, block_q=1, block_k=2, sharing="group", learns="gated"),
    "entmax": Hierarchical(k=8, block_q=4, block_k=2, branching=2, sharing="all", learns="entmax"),
    "entmax_per_token": Blocks(k=6, block_q=1, block_k=2, learns="entmax"),
}
VARIANTS |= {
    f"{attention}-{name}": config(ATTENTIONS[attention], select)
    for attention in ("multi_head", "grouped")
    for name, select in LEARNING.items()
}


def module(model: Model, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The variant's module with weights large enough that softmax is far from uniform."""
    made = build(model, 0).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
        parameter.data *= 1.5 * fan_in**-0.5
    return made


def hidden(length: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inputs of a variant's module."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 20, generator=generator, dtype=torch.float64).to(dtype)


def seen(
    select: Select,
    importance: torch.Tensor | None,
    compared: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float = 1.0,
) -> reference.Seen:
    """The keys of each query by the reference's count; `compared` are q and k of all positions."""
    match select:
        case Everything():
            return reference.everything
        case Window():
            return reference.window(select.size, select.sink)
        case PerHead():
            assert importance is not None
            return reference.per_head(importance, keep=select.keep, k=select.k)
        case Blocks():
            assert compared is not None
            return by_content.content(select, *compared, scale=scale)


def chosen(
    select: Select,
    importance: torch.Tensor,
    queries: int,
    block_q: int,
    compared: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float = 1.0,
) -> Selection | None:
    """The selection of the last queries in blocks of a given size, or of the size that is part of the choice."""
    batch, _, total = importance.shape
    match select:
        case Everything():
            return None
        case Window():
            return window(batch, queries, total, size=select.size, sink=select.sink, block_q=block_q, block_k=4)
        case PerHead():
            return per_head(importance, queries, keep=select.keep, k=select.k, block_q=block_q)
        case Blocks():
            assert compared is not None
            q, k = compared
            start, shape = total - queries, (batch, queries)
            index = remember(select, q[:, :, leading(select, 0)], k, 0, total)
            index = replace(index, leaders=index.leaders[:, :, start // select.block_q :])
            return selection_of(select, shape, total, None, q.device, index=index, scale=scale)
