"""Selectors: a file per way to say which keys a query sees; each returns a Selection with its closed-form cost.

`select` is the one place where a config's choice becomes a Selection (None: every visible key). Selectors that compare
queries and keys (`Blocks`, `Hierarchical`) search an `Index` of them, which `remember` builds, or continues in a
cache. An `Indexer` is a module, which learns and selects for itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention.select.auto import auto
from dsv3.attention.select.blocks import blocks
from dsv3.attention.select.blocks import search as search_blocks
from dsv3.attention.select.hierarchical import hierarchical
from dsv3.attention.select.hierarchical import search as search_tree
from dsv3.attention.select.index import Index, leading, unfinished
from dsv3.attention.select.indexer import LightningIndexer, indexer
from dsv3.attention.select.latest import latest_or
from dsv3.attention.select.learning import Compared, taught, weighed
from dsv3.attention.select.per_head import Importance, per_head
from dsv3.attention.select.window import window
from dsv3.attention.selection import Selection
from dsv3.config import Auto, Blocks, Everything, Hierarchical, Indexer, PerHead, Select, Window

__all__ = [
    "Compared",
    "Importance",
    "Index",
    "LightningIndexer",
    "auto",
    "blocks",
    "hierarchical",
    "indexer",
    "leading",
    "per_head",
    "remember",
    "select",
    "taught",
    "unfinished",
    "weighed",
    "window",
]


def select(
    choice: Select,
    shape: Sequence[int],
    total: int,
    importance: Float[Tensor, "B S H"] | None,
    device: torch.device,
    *,
    index: Index | None = None,
    scale: float = 1.0,
) -> Selection | None:
    """What `choice` lets the last `shape[1]` of `total` positions see, in each of `shape[0]` sequences.

    `importance` is for `PerHead`; `index` of all positions, and the softmax `scale`, for choices by content.
    """
    batch, queries = shape[0], shape[1]
    match choice:
        case Everything():
            return None
        case Window():
            return window(batch, queries, total, size=choice.size, sink=choice.sink, device=device)
        case PerHead():
            assert importance is not None, "per-head selection needs a score per token and head"
            return per_head(importance.transpose(1, 2), queries, keep=choice.keep, k=choice.k)
        case Auto() if total <= choice.crossover:
            return None
        case Hierarchical():
            assert index is not None, "a choice by content needs an index of what was said"
            return latest_or(search_tree, choice, index, total - queries, total, scale)
        case Blocks():
            assert index is not None, "a choice by content needs an index of what was said"
            return latest_or(search_blocks, choice, index, total - queries, total, scale)
        case Indexer():
            raise AssertionError("an indexer selects for itself: see LightningIndexer")
        case _:
            assert_never(choice)


def remember(
    choice: Blocks,
    q: Float[Tensor, "B H n P"],
    k: Float[Tensor, "B G m P"],
    start: int,
    total: int,
    held: Index | None = None,
) -> Index:
    """What is searched for the positions from `start` to `total`: `held` continued in place, or a new index.

    q: the `leading` queries among the new ones; k: all keys from `unfinished` on.
    """
    if held is None:
        assert start == 0, "an index of earlier positions is missing"
        size = (q.shape[0], q.shape[1], k.shape[1], q.shape[3])
        held = Index.empty(choice, size, total, torch.promote_types(q.dtype, k.dtype), k.device)
        held = replace(held, latest=None)  # nobody continues it
    return held.extend(choice, q, k, start, total)
