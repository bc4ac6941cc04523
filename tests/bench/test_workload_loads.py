"""What a workload does to experts: against counts by hand, on workloads whose loads are known in closed form."""

import pytest
import torch

from bench.routing_workloads import NAMES, Workload, expected_loads, expected_overlap
from bench.workload_loads import of_layers, of_step, overlap, routing
from dsv3.moe.routing import count


@pytest.mark.parametrize("name", NAMES)
def test_a_routing_chooses_what_it_scores_highest_and_counts_it(name: str) -> None:
    found = routing(Workload(name=name, tokens=40, experts=12, k=3), step=5, layer=1)
    highest = found.scores.topk(3, dim=1)
    assert torch.equal(highest.indices.sort(dim=1).values, found.indices.sort(dim=1).values)
    assert torch.equal(found.scores.gather(1, found.indices), found.weights)
    assert torch.equal(found.counts, count(found.indices, 12))


def test_an_attack_on_one_expert_of_eight_in_figures() -> None:
    workload = Workload(name="adversarial", tokens=512, experts=64, k=2)
    found = of_step(workload, step=3, ranks=8, factor=1.25)
    # 8 of 64 experts share 1024 pairs: 128 each, 8 times the mean, and a capacity of 20 takes 20 of each.
    assert found["effective_experts"] == pytest.approx(8)
    assert found["dead_experts"] == 56
    assert found["drop_share"] == pytest.approx(1 - 20 / 128)
    assert found["max_vio"] == found["rank_max_vio"] == 7
    assert found["excess_cv_squared"] == pytest.approx(7 - (64 - 2) / (512 * 2))
    assert 0 < found["drop_floor"] < found["drop_share"]


def test_even_loads_drop_nothing_and_no_capacity_holds_an_expert_that_every_token_wants() -> None:
    even = of_step(Workload(name="balanced", tokens=512, experts=32, k=4), step=0, ranks=4, factor=1.0)
    assert even["drop_share"] == even["excess_max_vio"] == even["dead_experts"] == 0
    hot = of_step(Workload(name="hot_expert", tokens=512, experts=32, k=1), step=0, ranks=4, factor=2.0)
    assert hot["drop_share"] == pytest.approx(1 - 2 / 32)


def test_layers_together_are_as_uneven_as_their_sum() -> None:
    exact = Workload(name="adversarial", tokens=512, experts=64, k=2)
    assert of_layers(exact, layers=3, ranks=8, steps=(0, 1)) == {"squared_load_deviation": 0.0, "rank_max_vio": 7.0}
    apart, alike = (Workload(name=name, tokens=4096, experts=64, k=2) for name in ("zipf", "correlated_layers"))
    for workload in (apart, alike):
        expected = sum(expected_loads(workload, step=0, layer=layer) for layer in range(16)).reshape(8, 8).sum(axis=1)
        found = of_layers(workload, layers=16, ranks=8, steps=(0,))["rank_max_vio"]
        assert found == pytest.approx(expected.max() / expected.mean() - 1, abs=0.1)
    together, averaged = (of_layers(one, layers=16, ranks=8, steps=(0,))["rank_max_vio"] for one in (alike, apart))
    assert together > 1.5 * averaged


def test_layers_share_what_the_closed_form_says_where_they_are_correlated() -> None:
    workload = Workload(name="correlated_layers", tokens=8192, experts=64, k=8)
    for apart in (1, 3):
        assert overlap(workload, apart=apart, steps=(0, 5)) == pytest.approx(
            expected_overlap(workload, apart=apart), abs=0.1
        )
    assert overlap(workload, apart=1, steps=(0,)) > overlap(workload, apart=3, steps=(0,))
    same = Workload(name="hot_expert", tokens=64, experts=8, k=8)
    assert overlap(same, apart=2, steps=(0,)) == 8
