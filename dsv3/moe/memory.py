"""Memory for a gradient that is asked for anew in every step.

The C library gives a large block back to the system when it is freed, and faults in every page when it is next asked
for. For the gradients of many small experts that costs as much as a good part of their matrix products. Here the memory
is kept, and lent again once nothing uses it.
"""

import weakref

import numpy as np
import torch
from torch import Tensor


class ReusedMemory:
    """Lends memory for one tensor at a time; the loan is back when the last tensor on its storage is gone.

    Whoever asks before that gets memory of his own. The price: the bytes are also held between steps, when gradients
    set to None would have freed theirs.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._loan: weakref.ref[np.ndarray] | None = None

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised contiguous tensor like `tensor`; off the CPU an ordinary one, as CUDA's allocator reuses."""
        if tensor.device.type != "cpu" or (self._loan is not None and self._loan() is not None):
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if self._memory is None or len(self._memory) != tensor.nbytes:
            self._memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
        # A storage made from an array keeps the array alive as long as itself: the array tells whether the loan is out.
        loan = self._memory.numpy()
        self._loan = weakref.ref(loan)
        return torch.from_numpy(loan).view(tensor.dtype).view(tensor.shape)

    def __reduce__(self) -> tuple[type["ReusedMemory"], tuple[()]]:
        return ReusedMemory, ()
