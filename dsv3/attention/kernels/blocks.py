"""The C++ kernel as operators that torch knows, `dsv3_kernels`: forward, backward, and choosing.

    indices, counts, opened, computed = dsv3_kernels::choose(query, nodes, ...)    blocks of keys for blocks of queries

Scores of a tile of 64 queries against up to 512 listed keys stay in the L2 cache, softmax and both products work on
them there (FlashAttention's tiling, arXiv 2205.14135, over listed blocks only); backward computes them again from lse.
Gradients of k and v go over the inverse of the selection, which blocks of queries list a block of keys, so that nobody
adds to what another thread writes (the inverse index of MoBA's and NSA's kernels, arXiv 2502.13189 and 2502.11089): the
number of threads changes no bit. Where most lanes of a tile would be empty, dot products take its place: for a single
query, as in decoding, span by span of its list (Flash-Decoding), and for queries with a list each, one by one; but many
heads that share keys and a list, as a latent's do, are a tile together. Their lists need no inverse: backward goes
query by query, and each thread adds what falls on a stretch of the keys. Nothing beyond inputs, results and gradients,
that of a bias included, grows with the sequence but the lists, the spans of a query, the nodes that a search by bounds
may look at, and in bf16 the fp32 sums of the gradients of the heads at work.
"""

import functools
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.attention.kernels import flops, registration
from dsv3.attention.selection import Selection
from dsv3.native import build

NAME = "dsv3_kernels"


@torch.compiler.assume_constant_result  # the compiler runs it and keeps the answer
def why_not() -> str | None:
    """None once the operators exist; otherwise the reason why not, as `build.why_not`."""
    return _prepared()


@functools.cache
def _prepared() -> str | None:
    reason = build.why_not(NAME, Path(__file__).parent, "attention")
    if reason is None:
        registration.register(NAME, lambda q, k, weights: q.shape[1])
        flops.register_choice(torch.ops.dsv3_kernels.choose)
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


def block_choice(
    query: Float[Tensor, "B h Nq W"],
    nodes: tuple[Float[Tensor, "B g _ V"], ...],
    searches: Int[Tensor, "Nq 3"],
    *,
    own: int,
    newest: int,
    longest: int,
    branching: int,
    bounds: bool = False,
    instructions: str = "",
) -> tuple[Int[Tensor, "B h Nq {longest}"], Int[Tensor, "B h Nq"], Int[Tensor, " levels"], int]:
    """Lists and counts of blocks of queries, how many nodes a walk by bounds opened on each level, and how many scores
    were computed in all.

    A row of `searches`: how many key blocks end before the block of queries, how many of those are seen besides the
    first and the previous one, and how many nodes of a level are kept. Also seen are the `own` blocks that follow, up
    to `newest`. branching: of the tree, 0: all leaves are scored. bounds: nodes are the largest and smallest numbers of
    their keys, V = 2 W.

    Raises:
        RuntimeError: where the kernel cannot be built.
        ValueError: for numbers that are not fp32, nodes that are too few, or lists longer than `longest`.
    """
    _demand()
    found: tuple[Tensor, Tensor, Tensor, int] = torch.ops.dsv3_kernels.choose(
        query, nodes, searches, own, newest, longest, branching, bounds, instructions
    )
    return found


def _demand() -> None:
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the C++ kernel of attention is not at hand: {reason}")
