"""Figures of a routing counted by hand."""

import pytest
import torch

from bench.meters.load import load
from dsv3.config import Fixed, MoE
from dsv3.moe import Routing

MOE = MoE(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=8)


def routing(kept: torch.Tensor | None = None) -> Routing:
    """Eight tokens: five to expert 0, three to expert 1, none to 2 and 3."""
    indices = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]).unsqueeze(1)
    return Routing(
        indices=indices,
        weights=torch.ones(8, 1),
        scores=torch.ones(8, 4),
        counts=torch.tensor([5, 3, 0, 0]),
        kept=kept,
    )


def test_the_figures_of_eight_tokens() -> None:
    figures = {figure.metric: figure.value for figure in load(routing(), MOE)}
    assert figures["max_vio"] == pytest.approx((5 - 2) / 2)
    assert figures["dead_experts"] == 2
    assert figures["gini"] == pytest.approx((-3 * 0 - 1 * 0 + 1 * 3 + 3 * 5) / (4 * 8))
    assert figures["drop_share"] == 0.0
    assert figures["excess_max_vio"] > 1.0
    assert "drop_floor" not in figures


def test_a_fixed_capacity_shows_what_it_drops_beside_what_chance_would() -> None:
    # Capacity ceil(8 / 4 * 1.5) = 3: two of expert 0's five tokens are refused.
    kept = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool).unsqueeze(1)
    fixed = MoE(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=8, capacity=Fixed(factor=1.5))
    figures = {figure.metric: figure.value for figure in load(routing(kept), fixed)}
    assert figures["drop_share"] == pytest.approx(2 / 8)
    assert 0.0 < figures["drop_floor"] < 2 / 8
