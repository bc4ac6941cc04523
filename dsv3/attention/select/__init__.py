"""Selectors: a file per way to say which keys a query sees; each returns a Selection with its closed-form cost.

`select` is the one place where a config's choice becomes a Selection (None: every visible key).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention.select.per_head import Importance, per_head
from dsv3.attention.select.window import window
from dsv3.attention.selection import Selection
from dsv3.config import Everything, PerHead, Select, Window

__all__ = ["Importance", "per_head", "select", "window"]


def select(
    choice: Select, shape: Sequence[int], total: int, importance: Float[Tensor, "B S H"] | None, device: torch.device
) -> Selection | None:
    """What `choice` lets the last `shape[1]` of `total` positions see, in each of `shape[0]` sequences."""
    batch, queries = shape[0], shape[1]
    match choice:
        case Everything():
            return None
        case Window():
            return window(batch, queries, total, size=choice.size, sink=choice.sink, device=device)
        case PerHead():
            assert importance is not None, "per-head selection needs a score per token and head"
            return per_head(importance.transpose(1, 2), queries, keep=choice.keep, k=choice.k)
