"""The analytic FLOPs against what torch counts when the model runs.

Torch has no formula for attention's fused kernel on a CPU, so scores are counted apart, on the textbook form.
"""

from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3.attention import eager
from dsv3.attention.select import indexer
from dsv3.attention.select.distillation import distillation
from dsv3.config import Blocks, Dropless, Indexer, Latent, Model, PerHead, vary
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
    assert (extra > 0) == isinstance(config.attention.select, PerHead | Indexer | Blocks)
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
    monkeypatch.setattr(import_module("dsv3.attention.select.scores"), "CHUNK", 1)
    with FlopCounterMode(display=False) as counter:
        q, weight, k = torch.ones(2, queries, heads, width), torch.ones(2, queries, heads), torch.ones(2, total, width)
        selection = indexer(q, weight, k, topk=select.index_topk)
    flops = cost.index_flops(select, total - queries + 1, total)
    assert counter.get_total_flops() == 2 * flops == 2 * selection.cost.scored * heads * (width + 1)


@pytest.mark.parametrize("name", ["deepseek_v32_warmup", "deepseek_v32"])
def test_the_loss_of_an_indexer_costs_what_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = VARIANTS[name].attention
    assert isinstance(attention, Latent)
    assert isinstance(attention.select, Indexer)
    heads, width, topk = attention.select.index_n_heads, attention.select.index_head_dim, attention.select.index_topk
    monkeypatch.setattr(import_module("dsv3.attention.select.scores"), "CHUNK", 1)
    of_indexer = torch.ones(1, LENGTH, heads, width), torch.ones(1, LENGTH, heads), torch.ones(1, LENGTH, width)
    q = torch.ones(1, attention.num_attention_heads, LENGTH, attention.qk_head_dim)
    selection = indexer(*of_indexer, topk=topk) if attention.select.stage == "sparse" else None
    with FlopCounterMode(display=False) as counter:
        distillation(*(x.requires_grad_() for x in of_indexer), (q, q), selection, scale=1.0).backward()
    # a query with fewer keys before it than topk goes over an empty rest of its list as well
    empty = 0 if selection is None else topk * (topk - 1) // 2
    pairs = cost.kept_pairs(attention.select, LENGTH)
    assert counter.get_total_flops() == cost.distillation_flops(attention, LENGTH) * (pairs + empty) / pairs


def test_training_an_indexer_pays_for_no_gradient_of_its_inputs() -> None:
    for name, backward in (("deepseek_v32_warmup", 0), ("deepseek_v32", 2)):
        config = vary(VARIANTS[name], mtp=None)
        forward = cost.forward_flops(config, LENGTH)
        own = sum(value for name, value in forward.items() if ".indexer." in name and not name.endswith(".scores"))
        choice = sum(value for name, value in forward.items() if name.endswith(".indexer.scores"))
        rest = sum(forward.values()) - own - choice
        loss = config.num_hidden_layers * cost.distillation_flops(config.attention, LENGTH)
        expected = (1 + backward) * rest + 2 * own + choice + loss
        assert cost.flops_per_token(config, LENGTH, training=True) * LENGTH == pytest.approx(expected, rel=1e-12)


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
