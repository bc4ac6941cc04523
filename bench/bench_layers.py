"""Cases of the layers: what normalising and gating in several kernels costs against torch's own single ones.

The form that every case file copies: build the arms once, say in `check` what they must agree on and how closely, hand
both to `measure_arms`. Sizes come from the profile, tensors live on `device`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Figures
from bench.record import Profile
from dsv3.layers import RMSNorm

ROWS = {"quick": 1024, "full": 8192}
WIDTH = 512


def bench_rms_norm(measure_arms: Callable[..., Figures], device: torch.device, profile: Profile) -> None:
    """dsv3's RMSNorm against torch.nn.RMSNorm: forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS[profile], WIDTH, generator=generator).to(device).requires_grad_()
    ours = RMSNorm(WIDTH, eps=1e-6).to(device)
    theirs = torch.nn.RMSNorm(WIDTH, eps=1e-6).to(device)

    def check() -> None:
        # Both sum WIDTH squares in fp32 in orders of their own; eps * sqrt(width) bounds how far those sums drift.
        tolerance = torch.finfo(torch.float32).eps * WIDTH**0.5
        torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)

    measure_arms(
        phase="forward_backward",
        baseline="torch.nn.RMSNorm",
        arms={"torch.nn.RMSNorm": _forward_backward(theirs, x), "dsv3.layers.RMSNorm": _forward_backward(ours, x)},
        check=check,
        axes={"rows": ROWS[profile], "width": WIDTH},
    )


def _forward_backward(module: torch.nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        x.grad = None
        module.zero_grad()
        module(x).sum().backward()

    return call
