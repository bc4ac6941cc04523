"""The best of each row, the same ones on every run: torch.topk leaves open which of equal scores it takes.

One more than asked for is taken. Only where the last taken equals the first left out does a tie decide what is taken,
and only those rows are sorted, stably; so equal scores go to the lower place at the price of topk. Where the order
counts too, any two neighbours that are equal send their row to be sorted.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def best(
    score: Float[Tensor, "r n"], number: Int[Tensor, " r"], *, ordered: bool = False
) -> tuple[Int[Tensor, "r m"], Bool[Tensor, "r m"]]:
    """Places of the number[i] best scores of row i, best first (equals in any order, unless `ordered`), and which of
    the m listed places count.

    A score of -inf is no candidate, so a row may have fewer; m is the largest number, or n.
    """
    most = min(int(number.max()), score.shape[1])
    value, place = score.topk(min(most + 1, score.shape[1]))
    rank = torch.arange(most, device=score.device)
    tied = (value[:, 1:] == value[:, :-1]) & (value[:, 1:] > float("-inf"))
    at = torch.arange(1, 1 + tied.shape[1], device=score.device)
    undecided = tied & (at <= number[:, None] if ordered else at == number[:, None])
    open_rows = undecided.any(dim=1).nonzero()[:, 0]
    place = place[:, :most]
    if len(open_rows):
        place[open_rows] = score[open_rows].argsort(dim=1, descending=True, stable=True)[:, :most]
    return place, (rank < number[:, None]) & (score.gather(1, place) > float("-inf"))


def fewest(score: Float[Tensor, "r m"], counted: Bool[Tensor, "r m"], mass: float) -> Bool[Tensor, "r m"]:
    """Of scores in descending order, the first ones that together hold `mass` of the softmax over the counted ones."""
    weight = score.masked_fill(~counted, float("-inf")).softmax(dim=1)
    return counted & (weight.cumsum(dim=1) - weight < mass)
