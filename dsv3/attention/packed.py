"""Packed documents through a module of attention: each by itself, at positions from 0 and with a choice of its own.

So nothing sees another document, whatever selects the keys, and no mask is made. Rows of a batch may be cut
differently. It is a loop over the documents, and costs what that costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention.selection import Selection
from dsv3.config.rules import require

Documents = Sequence[Sequence[int]]  # per row, where its documents begin
Attended = tuple[Tensor, Selection | None]


def attend_by_document(
    attention: Callable[[Tensor], Attended], x: Float[Tensor, "B T D"], documents: Documents
) -> tuple[Float[Tensor, "B T D"], tuple[Selection | None, ...]]:
    """The module's output, and which keys it let each document see, row by row.

    The loss of a selector that learns is weighted by its document's share of the positions: their sum is the mean.

    Raises:
        ValueError: for another number of rows, or places that do not begin with 0, ascend and lie in the row.
    """
    check(documents, x.shape[0], x.shape[1])
    rows, selections = [], []
    for row, starts in enumerate(documents):
        parts = []
        for low, high in pairwise([*starts, x.shape[1]]):
            out, selection = attention(x[row : row + 1, low:high])
            parts.append(out)
            selections.append(_weighted(selection, (high - low) / (x.shape[0] * x.shape[1])))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), tuple(selections)


def check(documents: Documents, batch: int, length: int) -> None:
    """Refuse places where no documents can begin in rows of that length.

    Raises:
        ValueError: for another number of rows, or places that do not begin with 0, ascend and lie in the row.
    """
    rule = f"must have a list for each of the {batch} rows"
    require(len(documents) == batch, "len(documents)", len(documents), rule, "say where each row's documents begin")
    for row, starts in enumerate(documents):
        rising = all(low < high for low, high in pairwise([*starts, length]))
        rule = f"must begin with 0, ascend and end below T={length}"
        fits = len(starts) > 0 and starts[0] == 0 and rising
        require(fits, f"documents[{row}]", list(starts), rule, "pass where each document begins")


def _weighted(selection: Selection | None, share: float) -> Selection | None:
    if selection is None or selection.loss is None:
        return selection
    return replace(selection, loss=selection.loss * share)
