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

from dsv3.attention import choice
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
    _check_shapes(q, k, v)
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


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        shape = tuple(tensor.shape)
        require(
            tensor.ndim == 4, f"{name}.shape", shape, "must be [batch, heads, positions, width]", "add the missing axes"
        )
    shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
    name = "(q.shape, k.shape, v.shape)"
    same = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]
    require(same, name, shapes, "batch, keys and widths must agree", "pass [B,H,T,P], [B,G,S,P] and [B,G,S,R]")
    filled = q.shape[0] > 0 and q.shape[2] > 0
    require(filled, name, shapes, "batch and positions must not be empty", "pass at least one token")
    kinds = (q.dtype, k.dtype, v.dtype)
    mixed = torch.is_autocast_enabled(q.device.type)
    require(mixed or len(set(kinds)) == 1, "dtypes", kinds, "must be one outside autocast", "convert them")
    divides = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    require(divides, name, shapes, "key-value heads must divide the query heads", "group the heads evenly")
    rule = "queries are the last T of S positions, so T must be at most S"
    require(q.shape[2] <= k.shape[2], name, shapes, rule, "pass the keys of all positions")


def _check_selection(q: Tensor, k: Tensor, selection: Selection) -> None:
    batch, heads, blocks, _ = selection.indices.shape
    expected = -(-q.shape[2] // selection.block_q)
    name, given = "selection.indices.shape", tuple(selection.indices.shape)
    rule = f"must be [{q.shape[0]}, h, {expected}, K] for {q.shape[2]} queries in blocks of {selection.block_q}"
    require((batch, blocks) == (q.shape[0], expected), name, given, rule, "select for these queries")
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
