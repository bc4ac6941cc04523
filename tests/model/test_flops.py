"""The analytic FLOPs against what torch counts when the model runs.

Torch has no formula for attention's fused kernel on a CPU, so scores are counted apart, on the textbook form.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3.attention import eager
from dsv3.config import Dropless, Model, vary
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
    extra = sum(value for name, value in cost.forward_flops(config, LENGTH).items() if "importance" in name)
    model, tokens = Transformer(dense), torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        output = model(tokens)
        forward = counter.get_total_flops()
        sum(logits.sum() for logits in (output.logits, *output.mtp_logits)).backward()
    assert forward == products(config) - extra
    assert counter.get_total_flops() == (1 + cost.BACKWARD_OVER_FORWARD) * forward


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
