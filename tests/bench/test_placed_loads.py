"""The busiest rank under placements: cases known in closed form, and what redundancy and drift do."""

import numpy as np
import pytest

from bench import placed_loads
from bench.placed_loads import BASELINE, busiest_rank, to_optimum
from bench.routing_workloads import NAMES, Workload
from bench.workload_sizes import PLACED, Ranks
from dsv3.moe.placement import Placement

SHAPE = Ranks(experts=16, ranks=4, steps=4)


def found(name: str, redundant: int, shape: Ranks = SHAPE) -> dict[str, float]:
    workload = Workload(name=name, tokens=512, experts=shape.experts, k=4)
    return dict(busiest_rank(workload, shape, redundant))


@pytest.mark.parametrize("redundant", [0, 4])
def test_where_all_experts_have_the_same_load_nothing_is_to_be_gained(redundant: int) -> None:
    ratios = found("balanced", redundant)
    assert ratios[BASELINE] == 1.0
    if redundant == 0:
        assert ratios == {BASELINE: 1.0, "placed": 1.0, "foreseen": 1.0}


def test_an_expert_that_every_token_wants_stays_whole_without_redundancy_and_is_shared_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of 10 tokens a step each goes to expert 0; the other three experts share 2 more.
    monkeypatch.setattr(placed_loads, "loads_of", lambda workload, step: np.array([10.0, 1.0, 1.0, 0.0]))
    shape = Ranks(experts=4, ranks=2, steps=3)
    assert found("hot_expert", 0, shape) == {BASELINE: 11 / 6, "placed": 10 / 6, "foreseen": 10 / 6}
    assert found("hot_expert", 2, shape) == {BASELINE: 11 / 6, "placed": 1.0, "foreseen": 1.0}


def test_loads_that_move_are_foreseen_better_than_they_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    moving = [np.roll([9.0, 1.0, 1.0, 1.0], step) for step in range(20)]
    monkeypatch.setattr(placed_loads, "loads_of", lambda workload, step: moving[step])
    ratios = found("drifting", 2, Ranks(experts=4, ranks=2, steps=6))
    assert ratios["placed"] > ratios["foreseen"] == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_knowing_the_step_is_best_and_what_is_in_order_does_not_depend_on_spare_slots(name: str) -> None:
    without, with_it = found(name, 0), found(name, 4)
    for ratios in (without, with_it):
        assert 1.0 - 1e-9 <= ratios["foreseen"] <= ratios["placed"] + 1e-9
    assert without["foreseen"] <= without[BASELINE]
    assert without[BASELINE] == with_it[BASELINE]


def test_on_skewed_loads_that_stay_placement_takes_most_of_the_excess_off() -> None:
    ratios = found("zipf", 4)
    assert ratios["placed"] - 1 < (ratios[BASELINE] - 1) / 2


def test_slots_that_do_not_divide_among_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts \+ redundant=18: must be a multiple of ranks=4"):
        found("zipf", 2)
    with pytest.raises(ValueError, match="experts=10: must be a multiple of ranks=4"):
        found("zipf", 0, Ranks(experts=10, ranks=4, steps=1))


def test_a_placement_that_loses_tokens_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "rank_loads", lambda self, loads: loads[:2])
    with pytest.raises(AssertionError, match="placed: ranks have"):
        found("zipf", 0)


def test_a_placement_better_than_can_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed_loads, "loads_of", lambda workload, step: np.array([10.0, 1.0, 1.0, 0.0]))
    monkeypatch.setattr(Placement, "rank_loads", lambda self, loads: np.full(2, loads.sum() / 2))
    with pytest.raises(AssertionError, match=r"the busiest rank has 6\.0, below the least 10\.0"):
        found("hot_expert", 0, Ranks(experts=4, ranks=2, steps=1))


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_cases_have_slots_that_divide(profile: str) -> None:
    shape = PLACED[profile]  # type: ignore[index]
    assert shape.experts % shape.ranks == shape.experts // 8 % shape.ranks == 0


def test_on_a_dozen_slots_the_best_placement_is_no_worse_and_placement_comes_near() -> None:
    workload = Workload(name="zipf", tokens=512, experts=8, k=2)
    ratios = to_optimum(workload, ranks=4, slots=3, steps=(0, 8))
    assert len(ratios) == 2
    assert all(1.0 <= ratio < 1.1 for ratio in ratios)
    assert max(ratios) > 1.0, "greedy placement is not the best of all here"
    assert to_optimum(Workload(name="balanced", tokens=512, experts=8, k=2), ranks=4, slots=2, steps=(0,)) == [1.0]


def test_a_placement_better_than_the_best_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed_loads, "reference_largest_load", lambda loads, ranks, slots: 2 * loads.sum())
    with pytest.raises(AssertionError, match=r"the busiest rank has .*, below the least"):
        to_optimum(Workload(name="zipf", tokens=64, experts=6, k=2), ranks=3, slots=2, steps=(0,))
