"""The analytic FLOPs against what torch counts when the model runs.

Torch has no formula for attention's fused kernel on a CPU, so scores are counted apart, on the textbook form.
"""

from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3.attention import eager
from dsv3.attention.select import indexer
from dsv3.config import Dropless, Indexer, Model, PerHead, vary
from dsv3.model import Transformer, cost
from tests.model.variants import VARIANTS

LENGTH = 13


def products(config: Model) -> int:
    flops = cost.forward_flops(config, LENGTH)
    return sum(value for name, value in flops.items() if not name.endswith(".scores"))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_products_are_what_torch_counts_forward_and_backward(config: Model) -> None:
    if config.moe is not None:
        config = vary(config, **{"moe.capacity": Dropless()})
    dense = vary(config, **{"attention.select": VARIANTS["dense"].attention.select})
    extra = products(config) - products(dense)
    assert (extra > 0) == isinstance(config.attention.select, PerHead | Indexer)
    model, tokens = Transformer(dense), torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        output = model(tokens)
        forward = counter.get_total_flops()
        sum(logits.sum() for logits in (output.logits, *output.mtp_logits)).backward()
    assert forward == products(config) - extra
    assert counter.get_total_flops() == (1 + cost.BACKWARD_OVER_FORWARD) * forward


@pytest.mark.parametrize("total, queries", [(13, 13), (13, 4), (5, 5), (6, 1)])
def test_scores_of_an_indexer_are_what_torch_counts(total: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    select = VARIANTS["deepseek_v32"].attention.select
    assert isinstance(select, Indexer)
    heads, width = select.index_n_heads, select.index_head_dim
    # a query at a time: together they also score what the first of them may not see
    monkeypatch.setattr(import_module("dsv3.attention.select.indexer"), "CHUNK", 1)
    with FlopCounterMode(display=False) as counter:
        q, weight, k = torch.ones(2, queries, heads, width), torch.ones(2, queries, heads), torch.ones(2, total, width)
        selection = indexer(q, weight, k, topk=select.index_topk)
    flops = cost.index_flops(select, total - queries + 1, total)
    assert counter.get_total_flops() == 2 * flops == 2 * selection.cost.scored * heads * (width + 1)


@pytest.mark.parametrize("name", ["deepseek_v3", "multi_head", "grouped"])
def test_causal_scores_are_half_of_the_square_that_torch_counts_and_half_its_diagonal(name: str) -> None:
    config = VARIANTS[name]
    per_pair = cost.macs_per_pair(config.attention)
    heads = config.attention.num_attention_heads
    width = per_pair // heads
    q, k, v = torch.ones(1, heads, LENGTH, 4), torch.ones(1, heads, LENGTH, 4), torch.ones(1, heads, LENGTH, width - 4)
    with FlopCounterMode(display=False) as counter:
        eager(q, k, v, scale=1.0)
    square = 2 * per_pair * LENGTH**2
    assert counter.get_total_flops() == square
    assert cost.attention_flops(config.attention, LENGTH) == (square + 2 * per_pair * LENGTH) // 2


def test_training_costs_three_forward_passes_per_token() -> None:
    config = VARIANTS["deepseek_v3"]
    forward = sum(cost.forward_flops(config, LENGTH).values())
    assert cost.flops_per_token(config, LENGTH) == forward / LENGTH
    assert cost.flops_per_token(config, LENGTH, training=True) == 3 * forward / LENGTH
