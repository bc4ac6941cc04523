"""The C++ kernel as operators that torch knows, `dsv3_kernels`.

Scores of a tile of 64 queries against up to 512 listed keys stay in the L2 cache, softmax and both products work on
them there (FlashAttention's tiling, arXiv 2205.14135, over listed blocks only); backward computes them again from lse.
Gradients of k and v go over the inverse of the selection, which blocks of queries list a block of keys, so that nobody
adds to what another thread writes (the inverse index of MoBA's and NSA's kernels, arXiv 2502.13189 and 2502.11089): the
number of threads changes no bit. Nothing beyond inputs, results and gradients grows with the sequence but the lists,
and in bf16 the fp32 sums of grad_q of the heads at work.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention.kernels import build, registration
from dsv3.attention.selection import Selection


@torch.compiler.assume_constant_result  # the compiler runs it and keeps the answer
def why_not() -> str | None:
    """None once the operators exist; otherwise the reason why not, as `build.why_not`."""
    return _prepared()


@functools.cache
def _prepared() -> str | None:
    reason = build.why_not()
    if reason is None:
        registration.register(build.NAME, lambda q, k, weights: q.shape[1])
    return reason


def instruction_sets() -> tuple[str, ...]:
    """What the kernel can be told to compute with on this processor, best first.

    Raises:
        RuntimeError: where the kernel cannot be built.
    """
    _demand()
    return tuple(torch.ops.dsv3_kernels.instructions().split())


def block_attention(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    v: Float[Tensor, "B G S R"],
    selection: Selection | None,
    *,
    scale: float,
    instructions: str = "",
) -> Float[Tensor, "B H T R"]:
    """Attention of the last T of S positions to the selected keys, None: to all up to their own; fp32 or bf16.

    A query that sees no key gets zero. `instructions` names one of `instruction_sets`; empty is the best.

    Raises:
        RuntimeError: where the kernel cannot be built.
        ValueError: for another number format, or lists that name blocks which do not exist.
    """
    _demand()
    given = registration.arguments(q, k, v, selection, scale)
    out: Tensor = torch.ops.dsv3_kernels.forward(*given, instructions)[0]
    return out


def _demand() -> None:
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the C++ kernel of attention is not at hand: {reason}")
