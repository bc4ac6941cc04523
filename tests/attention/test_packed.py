"""Packed documents: every variant sees in each what it sees where that stands alone."""

from itertools import pairwise

import pytest
import torch

from dsv3.attention import attend_by_document
from dsv3.config import Model
from tests.attention.variants import VARIANTS, hidden, module

# float64 eps is 2e-16; gradients of weights are sums over all documents, in another order
FLOAT64 = 1e-12
LENGTH = 61
DOCUMENTS = [[0, 1, 8, 37], [0, 30]]
every_variant = pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
def test_values_and_gradients_are_those_of_a_loop_over_the_documents(model: Model) -> None:
    made = module(model)
    results = []
    for packed in (True, False):
        x = hidden(LENGTH).requires_grad_()
        made.zero_grad()
        if packed:
            out, selections = attend_by_document(made, x, DOCUMENTS)
        else:
            rows = [[made(row[None, low:high]) for low, high in edges(i)] for i, row in enumerate(x)]
            out = torch.cat([torch.cat([part for part, _ in row], dim=1) for row in rows])
            selections = tuple(kept for row in rows for _, kept in row)
        out.square().sum().backward()
        chosen = [None if kept is None else kept.indices for kept in selections]
        results.append((out, x.grad, *(parameter.grad for parameter in made.parameters()), *chosen))
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)


@every_variant
def test_no_output_changes_by_a_bit_when_another_document_does(model: Model) -> None:
    made, before = module(model, torch.float32), hidden(LENGTH, dtype=torch.float32)
    after = before.clone()
    after[0, 8:37] = hidden(29, seed=1, dtype=torch.float32)[0]
    with torch.no_grad():
        one, other = attend_by_document(made, before, DOCUMENTS)[0], attend_by_document(made, after, DOCUMENTS)[0]
    same = [*range(8), *range(37, LENGTH)]
    assert torch.equal(one[0, same], other[0, same])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0, 8:37], other[0, 8:37])


def test_the_loss_of_an_indexer_is_the_mean_over_all_positions() -> None:
    made, x = module(VARIANTS["latent-indexer"]).train(), hidden(LENGTH)
    _, selections = attend_by_document(made, x, DOCUMENTS)
    whole = sum(
        (high - low) * made(x[row : row + 1, low:high])[1].loss for row in range(len(x)) for low, high in edges(row)
    )
    torch.testing.assert_close(sum(kept.loss for kept in selections), whole / (2 * LENGTH), rtol=FLOAT64, atol=0)
    assert whole > 0


@pytest.mark.parametrize(
    "documents, says",
    [
        ([[0]], r"len\(documents\)=1: must have a list for each of the 2 rows"),
        ([[0], []], r"documents\[1\]=\[\]: must begin with 0, ascend and end below T=61"),
        ([[1, 5], [0]], r"documents\[0\]=\[1, 5\]: must begin with 0"),
        ([[0, 5, 5], [0]], r"documents\[0\]=\[0, 5, 5\]: must begin with 0, ascend"),
        ([[0], [0, 61]], r"documents\[1\]=\[0, 61\]: must .* end below T=61"),
    ],
)
def test_places_where_no_document_can_begin_are_refused(documents: list[list[int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attend_by_document(module(VARIANTS["grouped-window"]), hidden(LENGTH), documents)


def edges(row: int) -> list[tuple[int, int]]:
    return list(pairwise([*DOCUMENTS[row], LENGTH]))
