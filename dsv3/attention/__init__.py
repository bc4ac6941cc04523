"""The attention room: modules make queries, keys and values, selectors say which keys, one `attend` does the rest."""

from dsv3.attention.attend import attend
from dsv3.attention.build import build
from dsv3.attention.cache import KeyValueCache, LayerCache
from dsv3.attention.choice import Implementation, implementation, why_not_kernel, why_not_triton, why_plain
from dsv3.attention.dense import dense, eager
from dsv3.attention.latent import LatentAttention
from dsv3.attention.multi_head import MultiHeadAttention
from dsv3.attention.packed import Documents, attend_by_document
from dsv3.attention.selection import Selection, SelectionCost

__all__ = [
    "Documents",
    "Implementation",
    "KeyValueCache",
    "LatentAttention",
    "LayerCache",
    "MultiHeadAttention",
    "Selection",
    "SelectionCost",
    "attend",
    "build",
    "attend_by_document",
    "dense",
    "eager",
    "implementation",
    "why_not_kernel",
    "why_not_triton",
    "why_plain",
]
