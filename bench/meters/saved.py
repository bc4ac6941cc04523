"""Bytes that forward keeps for backward: what recomputation and leaner kernels save.

autograd asks a pair of hooks for each tensor that it saves. The hook hands it a holder, and after forward the storages
behind the holders still alive are what waits for backward, each counted once however many views of it were saved.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bench.measurement import Measurement


class _Saved:
    """What autograd keeps in place of a tensor; lives as long as the graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> Measurement:
    """Bytes of the distinct storages that the graph of `forward()` keeps, without those of `parameters`.

    `forward` returns what holds the graph (an output with a grad_fn, or anything that contains one); inputs that are
    saved count, since a training step must keep them too.
    """
    holders: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        # Detached: a result saved by its own node would hold the node that holds it, and never die.
        holder = _Saved(tensor.detach())
        holders.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        graph = forward()
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {holder.tensor.untyped_storage().data_ptr(): holder.tensor.untyped_storage() for holder in holders}
    total = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in owned)
    del graph
    return Measurement(metric="saved_bytes", value=total)
