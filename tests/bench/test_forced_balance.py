"""Forced balance: even loads, the router's own scores, and the gate back in place afterwards."""

import pytest
import torch

from bench.forced_balance import balanced_indices, forced_balance
from dsv3.config import MoE, SignBias
from dsv3.train.state import TrainState
from dsv3.train.step import train_step
from tests.moe.layers import layer_of
from tests.train import small


@pytest.mark.parametrize("tokens, experts, k", [(64, 8, 2), (7, 5, 3), (1, 4, 4), (100, 6, 5)])
def test_loads_differ_by_one_at_most_and_experts_of_a_token_are_distinct(tokens: int, experts: int, k: int) -> None:
    moe = MoE(n_routed_experts=experts, num_experts_per_tok=k, moe_intermediate_size=8)
    chosen = balanced_indices(tokens, moe, seed=3)
    assert all(len(set(row)) == k for row in chosen.tolist())
    loads = torch.bincount(chosen.flatten(), minlength=experts)
    assert loads.max() - loads.min() <= 1


def test_inside_loads_are_even_weights_the_routers_and_the_bias_moves_and_after_it_all_is_as_before() -> None:
    moe = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, balance=(SignBias(rate=0.5),))
    layer = layer_of(moe)
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    before, routing = layer(x)
    with forced_balance(layer, seed=0):
        _, forced = layer(x)
        layer.update_bias(torch.tensor([4, 0, 2, 2, 2, 2, 2, 2]))
    assert forced.counts.tolist() == [8] * 8
    torch.testing.assert_close(forced.scores, routing.scores)
    torch.testing.assert_close(forced.weights.sum(dim=1), torch.ones(32))
    assert layer.gate.e_score_correction_bias.tolist() == [-0.5, 0.5] + [0.0] * 6
    layer.gate.e_score_correction_bias.zero_()
    assert torch.equal(layer(x)[0], before)


def test_a_training_step_inside_is_one_with_even_loads() -> None:
    state = TrainState.create(small.config(), seed=0)
    rows = torch.randint(small.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
    with forced_balance(state.model, seed=0):
        report = train_step(state, rows)
    assert report.health == "ok"
    assert [layer.gate.e_score_correction_bias.tolist() for layer in state.expert_layers] == [[0.0] * 4] * 2
