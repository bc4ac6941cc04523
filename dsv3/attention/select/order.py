"""The k-th smallest of every prefix of a sequence, all at once, in O(S log S).

Numbers are sorted bit by bit from the highest, stably, as in a wavelet matrix (Claude, Navarro, Ordonez 2015). A prefix
stays a range [low, high) at each bit: it holds as many zeros as were counted before `high` less those before `low`. The
k-th smallest has a zero there if k is below that count; otherwise a one, and k loses the zeros. One pass over the bits
answers every prefix, where a heap would walk token by token.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def kth_of_prefixes(
    permutation: Int[Tensor, "B h S"], lengths: Int[Tensor, " n"], k: Int[Tensor, " n"]
) -> Int[Tensor, "B h n"]:
    """For each i: the number at place k[i], counted from 0 in ascending order, among the first lengths[i] > k[i]
    numbers of each row.

    Rows hold every number from 0 to S-1 once.
    """
    values, rows = permutation, permutation.shape[:-1]
    place = torch.arange(values.shape[-1], device=values.device)
    low, high, left = (x.expand(*rows, -1) for x in (torch.zeros_like(lengths), lengths, k))
    found = torch.zeros_like(low)
    for bit in reversed(range(max(1, (values.shape[-1] - 1).bit_length()))):
        one = (values >> bit) & 1
        zeros = torch.nn.functional.pad((1 - one).cumsum(-1), (1, 0))
        total = zeros[..., -1:]
        low_zeros, high_zeros = zeros.gather(-1, low), zeros.gather(-1, high)
        upper = left >= high_zeros - low_zeros
        found = found + (upper.long() << bit)
        left = torch.where(upper, left - (high_zeros - low_zeros), left)
        low = torch.where(upper, total + low - low_zeros, low_zeros)
        high = torch.where(upper, total + high - high_zeros, high_zeros)
        target = torch.where(one.bool(), total + place - zeros[..., :-1], zeros[..., :-1])
        values = torch.empty_like(values).scatter_(-1, target, values)
    return found
