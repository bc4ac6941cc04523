"""Which storages are alive, operator by operator: bytes now, the highest sum, and what made it up.

A dispatch mode sees each operator's results. A storage is counted when it first appears and until it dies; views add
nothing. What an operator takes and gives back inside itself is not seen: `allocator` names that on real memory.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "activations and working memory"


class Live(TorchDispatchMode):
    """Inside, `now` and `peak` are bytes of tensors made inside or told of by `own`; `at_peak` has them by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kinds: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def own(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the tensors' storages as of this kind from here on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                reference, size, before = self._storages[key]
                self._storages[key] = reference, size, kind
                self._change(before, -size)
                self._change(kind, size)
            else:
                self._see(storage, kind)

    def gradients_of(self, parameters: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Count each gradient as one from the moment that it is there: of a parameter, and who holds its gradient."""
        for parameter, holder in parameters:
            parameter.register_post_accumulate_grad_hook(partial(self._own_gradient, holder))

    def _own_gradient(self, holder: nn.Parameter, parameter: Tensor) -> None:
        assert holder.grad is not None, "called when the gradient is there"
        self.own([holder.grad], "gradients")

    def restart(self) -> None:
        """Forget the highest sum."""
        self.peak, self.at_peak = self.now, dict(self.kinds)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages that it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._storages:
                    self._see(storage, OTHER)
        if self.now > self.peak:
            self.restart()
        return result

    def _see(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._storages[key] = weakref.ref(storage, lambda _: self._gone(key)), size, kind
        self._change(kind, size)

    def _gone(self, key: int) -> None:
        _, size, kind = self._storages.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, by: int) -> None:
        self.now += by
        self.kinds[kind] = self.kinds.get(kind, 0) + by
