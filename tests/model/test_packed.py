"""Packed documents through a whole model: logits and gradients of a loop over them, multi-token prediction included."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsv3.attention import KeyValueCache
from dsv3.config import Fixed, Model
from dsv3.model import Transformer
from tests.model.test_contract import tokens
from tests.model.variants import BASE, VARIANTS

# float64 eps is 2e-16; some 20 products of up to 28 terms follow each other, and gradients are sums over all tokens
FLOAT64 = 1e-11
DOCUMENTS = [[0, 1, 9], [0, 6, 8, 19]]
LENGTH = 20
# a capacity is one of the whole batch: which tokens it drops depends on who is there
ALONE = {
    name: model for name, model in VARIANTS.items() if model.moe is None or not isinstance(model.moe.capacity, Fixed)
}


@pytest.mark.parametrize("config", ALONE.values(), ids=ALONE.keys())
def test_logits_and_gradients_are_those_of_a_loop_over_the_documents(config: Model) -> None:
    model, text = Transformer(config).double().eval(), tokens(config, length=LENGTH)
    results = []
    for read in (packed, looped):
        model.zero_grad()
        logits = read(model, text)
        torch.cat([part.flatten() for part in logits]).sin().sum().backward()
        results.append((*logits, *(parameter.grad for parameter in model.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)


def packed(model: Transformer, text: Tensor) -> list[Tensor]:
    """Logits document by document, of each depth those that predict a token of the document."""
    output = model(text, documents=DOCUMENTS)
    depths = (output.logits, *output.mtp_logits)
    return [
        logits[row, low : high - m] for row, low, high in edges() for m, logits in enumerate(depths) if low < high - m
    ]


def looped(model: Transformer, text: Tensor) -> list[Tensor]:
    outputs = [model(text[row : row + 1, low:high]) for row, low, high in edges()]
    depths = [logits[0] for output in outputs for logits in (output.logits, *output.mtp_logits)]
    return [logits for logits in depths if len(logits)]


def edges() -> list[tuple[int, int, int]]:
    return [(row, low, high) for row, starts in enumerate(DOCUMENTS) for low, high in pairwise([*starts, LENGTH])]


def test_one_document_a_row_is_the_plain_forward_and_another_model_without_the_borders() -> None:
    model, text = Transformer(BASE).double().eval(), tokens(BASE, length=LENGTH)
    whole, one, several = (model(text, documents=given) for given in (None, [[0], [0]], DOCUMENTS))
    torch.testing.assert_close(one.logits, whole.logits, rtol=FLOAT64, atol=FLOAT64)
    assert not torch.allclose(several.logits[:, 10:], whole.logits[:, 10:], rtol=FLOAT64, atol=FLOAT64)
    blocks = BASE.num_hidden_layers
    assert len(several.selection) == 7 * blocks + 6, "the last document is gone one token ahead"


def test_documents_are_refused_with_a_cache_and_where_none_can_begin() -> None:
    model, text = Transformer(BASE), tokens(BASE, length=LENGTH)
    with pytest.raises(ValueError, match=r"documents=.*: must be None with a cache"):
        model(text, cache=KeyValueCache.empty(BASE, 2, LENGTH), documents=DOCUMENTS)
    with pytest.raises(ValueError, match=r"documents\[0\]=\[3\]: must begin with 0"):
        model(text, documents=[[3], [0]])
