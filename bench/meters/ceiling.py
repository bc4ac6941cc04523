"""What this machine can do at most: operations of a large matrix product and bytes of a large copy, per second.

    gemm rate    2 n^3 / fastest of the calls
    copy rate    2 x bytes / fastest of the calls        (read once, written once)

The fastest call is the one least disturbed, so a ceiling is a maximum where everything else here is a median. A speed
beside its share of the ceiling can be compared across machines; a share above 1 means that the ceiling was disturbed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measurement import Measurement
from bench.meters.paired import Clock, cuda_clock, process_clock

CALLS, SECONDS = 10, 1.0  # calls, or as many as begin within a second: torch may lack a product for the format
WIDTH = {"cpu": 1024, "cuda": 8192}  # large enough that a product is bound by arithmetic, not by reading its factors
BYTES = {"cpu": 2**27, "cuda": 2**30}  # beyond the caches


def gemm_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, *, calls: int = CALLS, which: str = "wall"
) -> Measurement:
    """Operations per second of a square product in `dtype`, by the "wall" or "cpu" clock, with torch's threads."""
    n = WIDTH[device.type]
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    taken = _times(lambda: torch.mm(a, b, out=out), device, calls, which)
    return Measurement(metric="gemm_flops_per_second", value=2 * n**3 / min(taken), n=len(taken), over="calls")


def copy_rate(device: torch.device, *, calls: int = CALLS) -> Measurement:
    """Bytes read and written per second by a copy."""
    source = torch.ones(BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    taken = _times(lambda: target.copy_(source), device, calls, "wall")
    rate = 2 * BYTES[device.type] / min(taken)
    return Measurement(metric="copy_bytes_per_second", value=rate, n=len(taken), over="calls")


def _times(call: Callable[[], Tensor], device: torch.device, calls: int, which: str) -> list[float]:
    clock: Clock = process_clock if device.type == "cpu" else cuda_clock
    taken = list[float]()
    while len(taken) <= calls and sum(taken) < SECONDS:
        start = clock()
        call()
        taken.append(getattr(clock(), which) - getattr(start, which))
    return taken[1:] or taken  # the first warms up, unless it lasts so long that there is no other
