"""Cases of the machine itself: the ceilings beside which every speed is read."""

from collections.abc import Callable

import pytest
import torch

from bench.fingerprint import cores
from bench.meters.ceiling import copy_rate, gemm_rate
from bench.meters.paired import threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def bench_gemm(keep: Callable[..., None], device: torch.device, dtype: torch.dtype) -> None:
    """A large matrix product in each format, at one thread and at all cores."""
    if device.type == "cpu" and dtype is torch.float16:
        pytest.skip("few processors multiply fp16; torch converts, for minutes")
    for count in (1, cores()) if device.type == "cpu" else (1,):
        with threads(count):
            keep(str(dtype)[6:], [gemm_rate(device, dtype)], axes={"threads": count})


def bench_copy(keep: Callable[..., None], device: torch.device) -> None:
    """A large copy, at all cores."""
    with threads(cores()):
        keep("copy", [copy_rate(device)], axes={"threads": cores()})
