"""The block-scaled product as a tensor core with promotion forms it, one block of the sum after the other, in float64.

    y[m, n] = sum over blocks b of K:  x.scale[m, b] * w.scale[b, n] * (sum over k in b of  x.code[m, k] * w.code[k, n])

(arXiv 2412.19437 section 3.3.2 and figure 7: partial sums leave the tensor core every 128 of K, are scaled and added in
fp32.) In float64 nothing of that rounds noticeably, so this is the value that both a GPU kernel and our emulation of it
approximate. Slow; for tests and for the parity check of benchmarks.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.precision.block_scale import Quantised


def product(x: Quantised, weight: Quantised) -> Float[Tensor, "M N"]:
    """x [M, K] in tiles of 1 x block times weight [K, N] in blocks of block x block, as float64."""
    block = x.recipe.tile[1]
    assert block is not None, "the tile of x has a fixed width along the dimension summed over"
    assert weight.recipe.tile == (block, block), "the blocks of both sides are equally long along that dimension"
    codes_MK, codes_KN = x.codes.double(), weight.codes.double()
    y_MN = torch.zeros(codes_MK.shape[0], codes_KN.shape[1], dtype=torch.float64)
    for at, start in enumerate(range(0, codes_MK.shape[1], block)):
        partial_MN = codes_MK[:, start : start + block] @ codes_KN[start : start + block]
        column_scale_N = weight.scale[at].double().repeat_interleave(block)[: y_MN.shape[1]]
        y_MN += partial_MN * x.scale[:, at, None].double() * column_scale_N
    return y_MN
