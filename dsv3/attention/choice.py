"""Which code computes a selection: on a CPU the C++ kernel where the machine can build it, on a GPU the Triton kernel
where Triton is there, elsewhere plain PyTorch.

The kernels multiply whole blocks and read them where they lie. On a CPU single keys that many queries share are left to
the plain path, which gathers them once and multiplies them as a matrix; on a GPU all blocks of keys that are too short
for its products. Dense attention goes to torch's own kernel. Each can be had from any by name, as can the Triton kernel
on a CPU, in Triton's interpreter, to be looked at and tested. A bias for each listed block the Triton kernel does not
add.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from dsv3.attention.kernels import blocks, registration, triton_blocks
from dsv3.attention.selection import Selection
from dsv3.config.rules import require

Implementation = Literal["kernel", "triton", "plain"]
SHORTEST = 16  # keys of a block on a GPU: the least columns of its products
SHARERS = 4  # at most so many read single keys where they lie (`one_by_one` in operators.cpp) faster than gathered


def implementation(q: Tensor, selection: Selection | None) -> Implementation:
    """What `attend` uses for these queries unless told; the first fitting call compiles the kernel."""
    if why_plain(q, selection) is not None:
        return "plain"
    return "triton" if q.device.type == "cuda" else "kernel"


def why_plain(q: Tensor, selection: Selection | None) -> str | None:
    """None where `implementation` says a kernel; otherwise the reason, in a line."""
    if selection is None:
        return "torch has a kernel of its own for dense attention"
    if q.device.type != "cuda":
        shared = selection.block_k == 1 and min(selection.block_q, q.shape[2]) > SHARERS
        return "single keys shared by many queries are gathered once" if shared else why_not_kernel(q)
    if selection.bias is not None:
        return "each listed block has a bias, which the Triton kernel does not add"
    return "blocks of keys are too short for a GPU's products" if selection.block_k < SHORTEST else why_not_triton(q)


def why_not_kernel(q: Tensor) -> str | None:
    """None where the C++ kernel can compute these queries; otherwise the reason."""
    if q.device.type != "cpu":
        return f"it runs on a CPU, not on {q.device.type}"
    return _why_not_format(q) or blocks.why_not()


def why_not_triton(q: Tensor) -> str | None:
    """None where the Triton kernel can compute these queries; otherwise the reason."""
    return triton_blocks.why_not(q.device.type, q.shape[3]) or _why_not_format(q)


def check_choice(name: str, q: Tensor) -> None:
    """Refuse an unknown name, and a kernel where it cannot compute.

    Raises:
        ValueError: with the reason.
    """
    known = get_args(Implementation)
    rule = f"must be one of {', '.join(known)}"
    require(name in known, "implementation", name, rule, "leave it out to have it chosen")
    reason = {"kernel": why_not_kernel, "triton": why_not_triton, "plain": lambda _: None}[name](q)
    require(reason is None, "implementation", name, f"cannot be used here: {reason}", "use 'plain'")


def _why_not_format(q: Tensor) -> str | None:
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    if dtype in registration.FORMATS:
        return None
    return f"it computes in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
