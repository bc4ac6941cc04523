"""A routing of real text: it depends on its seed alone, is balanced over much text, and not in a batch."""

import pytest
import torch

from bench.text_routing import text_routing
from dsv3.config import MoE
from dsv3.moe.load import load_statistics


def moe(experts: int, k: int) -> MoE:
    return MoE(n_routed_experts=experts, num_experts_per_tok=k, moe_intermediate_size=16)


@pytest.mark.parametrize(("experts", "k", "tokens"), [(8, 2, 33), (8, 8, 16), (64, 2, 1024), (64, 8, 200)])
def test_every_token_has_its_distinct_experts_and_the_seed_says_which(experts: int, k: int, tokens: int) -> None:
    found = text_routing(tokens, moe(experts, k), seed=3)
    assert found.indices.shape == found.weights.shape == (tokens, k)
    assert all(row.unique().numel() == k for row in found.indices)
    assert int(found.counts.sum()) == tokens * k
    again, other = (text_routing(tokens, moe(experts, k), seed=seed) for seed in (3, 4))
    assert torch.equal(found.indices, again.indices)
    assert k == experts or not torch.equal(found.indices, other.indices)


def test_a_batch_is_less_even_than_chance_and_much_text_more_even_than_a_batch() -> None:
    batch, text = (load_statistics(text_routing(tokens, moe(64, 2)).counts, 2) for tokens in (2048, 65536))
    # 64 rows an expert: chance gives 1, give or take a tenth; a router that nobody balances has 10 and more.
    assert 1.2 < batch.excess_max_vio < 5.0
    assert text.max_vio < 0.75 * batch.max_vio  # 32 batches: what each wants differs, and the bias is of other text
    assert text.dead == 0
