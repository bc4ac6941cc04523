"""Which code computes a selection: the C++ kernel where it fits and the machine can build it, plain PyTorch elsewhere.

The kernel multiplies whole blocks. Selections that a token-exact rule thins out within their blocks, or whose blocks of
keys are shorter than a vector, are left to the plain path, as is dense attention, which torch has a kernel for; each
can be had from either by name.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from dsv3.attention.kernels import blocks
from dsv3.attention.selection import Selection
from dsv3.config.rules import require

Implementation = Literal["kernel", "plain"]
SHORTEST = 16  # keys of a block: the floats of one vector
FORMATS = (torch.float32, torch.bfloat16)


def implementation(q: Tensor, selection: Selection | None) -> Implementation:
    """What `attend` uses for these queries unless told; the first fitting call compiles the kernel."""
    fits = selection is not None and selection.rank is None and selection.block_k >= SHORTEST
    return "kernel" if fits and why_not_kernel(q) is None else "plain"


def why_not_kernel(q: Tensor) -> str | None:
    """None where the kernel can compute these queries; otherwise the reason."""
    if q.device.type != "cpu":
        return f"it runs on a CPU, not on {q.device.type}"
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    if dtype not in FORMATS:
        return f"it computes in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return blocks.why_not()


def check_choice(name: str, q: Tensor) -> None:
    """Refuse an unknown name, and the kernel where it cannot compute.

    Raises:
        ValueError: with the reason.
    """
    known = get_args(Implementation)
    rule = f"must be one of {', '.join(known)}"
    require(name in known, "implementation", name, rule, "leave it out to have it chosen")
    reason = why_not_kernel(q) if name == "kernel" else None
    require(reason is None, "implementation", name, f"cannot be used here: {reason}", "use 'plain'")
