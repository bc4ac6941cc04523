"""The parallel room: one model on several processes, applied from outside to a single-device model.

    data    data parallelism: gradients and batch statistics averaged over processes, `torchrun -m dsv3.train`

A process group is handed in, never looked up.
"""

from dsv3.parallel.data import ALONE, Ranks, joined

__all__ = ["ALONE", "Ranks", "joined"]
