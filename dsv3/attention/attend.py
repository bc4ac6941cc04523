"""attend(q, k, v, selection): the one function through which every variant of attention goes.

    out_t = sum_j softmax_j(scale * q_t . k_j + weight_j + bias_t(block of j)) v_j      over the keys j that the
    selection lets t see (None: all j <= t)

A selector decides which keys; this decides nothing. So variants share kernels and tests, and what a variant costs is
what its selection costs. A query that sees no key gets 0 and gives no gradient.

Softmax weighs what a query does not see with 0, and 0 times NaN is NaN: a NaN or infinite value reaches all queries
that are computed together with its key (the plain path's block of queries, the kernel's tile of 64, torch's own tiles),
in the plain path and torch's kernels a NaN key as well.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention import choice, shapes
from dsv3.attention.dense import dense
from dsv3.attention.kernels import blocks, triton_blocks
from dsv3.attention.selection import Selection
from dsv3.attention.sparse import sparse
from dsv3.config.rules import require


def attend(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    v: Float[Tensor, "B G S R"],
    selection: Selection | None = None,
    *,
    scale: float | None = None,
    implementation: choice.Implementation | None = None,
) -> Float[Tensor, "B H T R"]:
    """Attention of queries at the last T of S positions; head i reads key-value head i // (H/G). `scale` defaults to
    P^-0.5.

    `implementation` defaults to what `dsv3.attention.implementation` says of q and the selection; the results differ by
    rounding.

    Raises:
        ValueError: for shapes that do not fit each other, a selection made for other shapes, or an implementation that
            cannot compute them here.
    """
    shapes.check(q, k, v)
    _check_dtypes(q, k, v)
    if implementation is not None:
        choice.check_choice(implementation, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if selection is not None:
        _check_selection(q, k, selection)
    chosen = implementation or choice.implementation(q, selection)
    if chosen == "kernel":
        return blocks.block_attention(q, k, v, selection, scale=scale)
    if chosen == "triton":
        return triton_blocks.block_attention(q, k, v, selection, scale=scale)
    if selection is None:
        return dense(q, k, v, scale=scale)
    return sparse(q, k, v, selection, scale=scale)


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    kinds = (q.dtype, k.dtype, v.dtype)
    mixed = torch.is_autocast_enabled(q.device.type)
    require(mixed or len(set(kinds)) == 1, "dtypes", kinds, "must be one outside autocast", "convert them")


def _check_selection(q: Tensor, k: Tensor, selection: Selection) -> None:
    batch, expected = q.shape[0], -(-q.shape[2] // selection.block_q)
    name, given = "selection.indices.shape", tuple(selection.indices.shape)
    rule = f"must be [{batch}, h, {expected}, K] for {q.shape[2]} queries in blocks of {selection.block_q}"
    require(given[:1] + given[2:-1] == (batch, expected), name, given, rule, "select for these queries")
    heads = given[1]
    allowed = {1, k.shape[1], q.shape[1]}
    require(
        heads in allowed, name, given, f"h must be one of {sorted(allowed)}", "select per head, per group or for all"
    )
    parts = {
        "counts": (selection.counts, expected),
        "rank": (selection.rank, k.shape[2]),
        "limit": (selection.limit, q.shape[2]),
        "weights": (selection.weights, k.shape[2]),
    }
    bias = None if selection.bias is None else tuple(selection.bias.shape)
    require(bias in (None, given), "selection.bias.shape", bias, f"must be {given}", "give each listed block one")
    for name, (tensor, length) in parts.items():
        if tensor is not None:
            shape, want = tuple(tensor.shape), (batch, heads, length)
            require(shape == want, f"selection.{name}.shape", shape, f"must be {want}", "select for these keys")
