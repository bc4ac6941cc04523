"""Load statistics: numbers worked by hand, and floors against the sampling they stand for."""

import math

import numpy as np
import pytest
import torch

from dsv3.moe import LoadStatistics, drop_floor, dropped_share, load_statistics, max_vio, max_vio_floor
from dsv3.moe.load import block_floor, distinct_experts, rank_max_vio, uniform_counts


def test_statistics_of_four_experts_by_hand() -> None:
    # The mean is 2, the variance (4 + 4) / 4, and the six differences between pairs add up to 4+2+2+2+2+0 = 12.
    found = load_statistics(torch.tensor([4, 0, 2, 2]), k=2)
    assert found.max_vio == pytest.approx(1.0)
    assert found.cv == pytest.approx(math.sqrt(2) / 2)
    assert found.gini == pytest.approx(12 * 2 / (16 * 4))
    assert found.dead == 1
    assert found.effective_experts == pytest.approx(2**1.5)
    assert found.excess_cv_squared == pytest.approx(0.5 - 2 / 8)
    assert found.dropped == 0.0


def test_max_vio_of_layers_is_that_of_each_to_the_bit() -> None:
    layers = torch.randint(1, 1000, (5, 7), generator=torch.Generator().manual_seed(0))
    found = max_vio(layers)
    assert found.dtype == torch.float64
    assert found.tolist() == [load_statistics(layer, k=1).max_vio for layer in layers]
    assert found.tolist() == [rank_max_vio(layer, 7) for layer in layers]
    assert found.tolist() == [float(max(layer)) / (sum(layer) / 7) - 1 for layer in layers.tolist()]
    assert max_vio(torch.zeros(2, dtype=torch.int64)).isnan()


def test_perfect_balance_has_no_violation_and_all_experts_effective() -> None:
    found = load_statistics(torch.full((16,), 8), k=4)
    assert (found.max_vio, found.cv, found.gini, found.dead) == (0.0, 0.0, pytest.approx(0.0), 0)
    assert found.effective_experts == pytest.approx(16)
    assert found.excess_max_vio == 0.0
    assert found.excess_cv_squared < 0.0


def test_one_expert_with_everything_is_the_far_end_of_every_statistic() -> None:
    found = load_statistics(torch.tensor([12, 0, 0, 0]), k=1)
    assert found.max_vio == 3.0
    assert found.gini == 0.75
    assert found.effective_experts == pytest.approx(1.0)
    assert found.dead == 3


def test_dropped_share_is_that_of_pairs_not_kept() -> None:
    kept = torch.tensor([[True, False], [True, True]])
    assert load_statistics(torch.tensor([3, 1]), k=2, kept=kept).dropped == 0.25


@pytest.mark.parametrize("counts", [[0, 0], [2, 1]])
def test_counts_that_are_no_sum_over_tokens_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="must add up to tokens x k"):
        load_statistics(torch.tensor(counts), k=2)


def test_uniform_routing_is_at_its_floor() -> None:
    counts = torch.tensor(uniform_counts(64, 4, 1024, seed=1))
    found = [load_statistics(row, k=4) for row in counts]
    # Means of 200 draws; their standard errors are about 1.5% and 1% of what is compared.
    assert np.mean([row.excess_max_vio for row in found]) == pytest.approx(1.0, rel=0.06)
    mean_square = (64 - 4) / (1024 * 4)
    assert np.mean([row.excess_cv_squared for row in found]) == pytest.approx(0.0, abs=0.06 * mean_square)


@pytest.mark.parametrize("experts, k", [(5, 2), (5, 3), (3, 3), (7, 1)])
def test_every_set_of_experts_is_drawn_as_often_as_any_other(experts: int, k: int) -> None:
    tokens = 4000
    chosen = np.sort(distinct_experts(np.random.default_rng(0), experts, k, tokens), axis=1)
    sets, times = np.unique(chosen, axis=0, return_counts=True)
    assert len(sets) == math.comb(experts, k)
    assert all(len(set(row)) == k for row in sets.tolist())
    expected = tokens / len(sets)
    # Five standard deviations of a binomial count.
    assert np.abs(times - expected).max() <= 5 * math.sqrt(expected)


def test_floor_falls_with_rows_per_expert_and_is_zero_when_all_are_chosen() -> None:
    floors = [max_vio_floor(128, 2, tokens) for tokens in (512, 2048, 8192)]
    assert floors == sorted(floors, reverse=True)
    assert max_vio_floor(8, 8, 10) == 0.0
    assert LoadStatistics(0.0, 0.0, 0.0, 0.0, 0.0, 0, 8.0, 0.0).excess_max_vio == 1.0


def test_drop_floor_is_what_uniform_routing_loses_at_a_capacity() -> None:
    assert drop_floor(4, 1, 8, capacity=8) == 0.0
    assert drop_floor(4, 1, 8, capacity=1) == pytest.approx(
        np.maximum(uniform_counts(4, 1, 8) - 1, 0).sum(1).mean() / 8
    )
    # Two experts, one token: whoever gets it is one over a capacity of zero.
    assert drop_floor(2, 1, 1, capacity=0) == 1.0


def test_what_no_token_has_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens=0: must be at least 1"):
        max_vio_floor(8, 2, 0)
    with pytest.raises(ValueError, match="tokens=0: must be at least 1"):
        drop_floor(8, 2, 0, capacity=0)
    with pytest.raises(ValueError, match=r"counts=\[0, 0\]: must be of at least one token"):
        rank_max_vio(torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"empty blocks=\[1\]: every block must have tokens"):
        block_floor(torch.tensor([[1, 2], [0, 0]]), 1)
    assert dropped_share(torch.zeros(0, 2, dtype=torch.bool)) == 0.0


def test_floors_repeat_exactly() -> None:
    first = uniform_counts(16, 2, 100).copy()
    uniform_counts.cache_clear()
    assert np.array_equal(first, uniform_counts(16, 2, 100))


def test_blocks_of_independent_tokens_have_the_floor_of_uniform_routing() -> None:
    one_token_each = torch.tensor(uniform_counts(32, 2, 1, draws=20_000, seed=3))
    # A mean of 200 draws of a maximum, whose standard error is about 1.5%.
    assert block_floor(one_token_each, 1024) == pytest.approx(max_vio_floor(32, 2, 1024), rel=0.06)


def test_a_block_floor_does_not_see_what_the_router_prefers_everywhere() -> None:
    always = torch.tensor([30, 1, 1, 0]).repeat(64, 1)
    assert block_floor(always, 8) == pytest.approx(0.0)


def test_a_block_that_has_its_expert_to_itself_is_as_far_as_its_batch_lets_it() -> None:
    own = 10 * torch.eye(8, dtype=torch.int64)
    assert block_floor(own, 1) == pytest.approx(7.0)
    assert block_floor(own, 8) == pytest.approx(0.0)


def test_more_blocks_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"blocks=9.*S=8"):
        block_floor(torch.ones(8, 4, dtype=torch.int64), 9)


def test_ranks_may_be_even_where_experts_are_not() -> None:
    counts = torch.tensor([9, 1, 2, 8])
    assert rank_max_vio(counts, 2) == 0.0
    assert rank_max_vio(counts, 4) == pytest.approx(0.8)
    assert rank_max_vio(counts, 1) == 0.0
    with pytest.raises(ValueError, match="ranks=3"):
        rank_max_vio(counts, 3)
