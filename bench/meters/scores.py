"""Scores that choosing keys computes, counted as the search runs: products of a query and a node, by their operands.

A score is a sum over the node's width, taken as a matrix product where no search has left a node out yet, and as a
product number by number that is then summed where nodes are gathered. torch's FlopCounterMode sees the former alone;
here both count, padding included, whatever the search says of itself. A search may be one call of the C++ kernel, which
adds up the scores that it takes. A score is 2 * width FLOPs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def scores(call: Callable[[], object], width: int) -> int:
    """How many scores over `width` numbers the call computes; nothing else in it may multiply rows of that width."""
    with _Products(width) as counted:
        call()
    return counted.number


class _Products(TorchDispatchMode):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.number = width, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count it."""
        result = func(*args, **(kwargs or {}))
        aten, packet = torch.ops.aten, func._overloadpacket
        if packet in (aten.mm, aten.bmm) and args[0].shape[-1] == self.width:
            self.number += result.numel()
        if func.name() == "dsv3_kernels::choose" and args[1][0].shape[-1] == self.width:
            self.number += result[3]
        rows = packet in (aten.mul, aten.mul_) and all(isinstance(x, Tensor) and x.ndim > 1 for x in args[:2])
        if rows and result.is_floating_point() and result.shape[-1] == self.width:
            self.number += result.numel() // self.width
        return result
