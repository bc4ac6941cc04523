"""Paired timing against arms whose speed is known: a clock that the arms advance themselves, and one real clock."""

import time
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.interval import of_median
from bench.measurement import Measurement
from bench.meters.paired import Seconds, order, paired_ratios, process_clock, threads


class Machine:
    """A machine whose speed drifts by half within a run and jitters by a tenth from call to call."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = Random(seed)

    def clock(self) -> Seconds:
        return Seconds(cpu=self.now, wall=self.now)

    def arm(self, cost: float) -> Callable[[], None]:
        def call() -> None:
            drift = 1.0 + 0.5 * (self.now % 10.0) / 10.0
            self.now += cost * drift * self.random.lognormvariate(0.0, 0.1)

        return call


def measure(seed: int, slowdown: float, blocks: int = 15) -> Measurement:
    machine = Machine(seed)
    arms = {"plain": machine.arm(0.02), "arm": machine.arm(0.02 * slowdown)}
    figures = paired_ratios(arms, baseline="plain", phase="forward", blocks=blocks, clock=machine.clock)
    return next(figure for figure in figures["arm"] if figure.metric == "forward_cpu_ratio")


def test_an_arm_slower_by_a_fifth_is_found() -> None:
    found = [measure(seed, 1.2) for seed in range(50)]
    assert sum(figure.interval is not None and figure.interval[0] > 1.0 for figure in found) >= 45
    assert all(figure.n == 15 for figure in found)


def test_equal_arms_are_told_apart_no_more_often_than_the_level_says() -> None:
    intervals = [measure(seed, 1.0).interval for seed in range(200)]
    false = sum(interval is not None and not interval[0] <= 1.0 <= interval[1] for interval in intervals)
    # 5% of 200 is 10, its standard deviation 3.1; the order statistics of 15 blocks leave 3.5%.
    assert false <= 10 + 3 * 3.1


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    intervals = [measure(seed, 1.2, blocks=7).interval for seed in range(200)]
    assert sum(interval is not None and interval[0] <= 1.2 <= interval[1] for interval in intervals) >= 0.92 * 200


def test_a_real_arm_with_half_more_work_is_found() -> None:
    def work(rounds: int) -> Callable[[], None]:
        def call() -> None:
            sum(i * i for i in range(rounds))

        return call

    arms = {"plain": work(100_000), "same": work(100_000), "more": work(150_000)}
    figures = paired_ratios(arms, baseline="plain", phase="step", blocks=9)
    ratio = {arm: {figure.metric: figure for figure in found} for arm, found in figures.items()}
    more, same = ratio["more"]["step_cpu_ratio"], ratio["same"]["step_cpu_ratio"]
    assert 1.25 < more.value < 1.8
    assert more.interval is not None
    assert more.interval[0] > 1.0
    assert 0.8 < same.value < 1.25
    assert set(ratio["plain"]) == {"cpu_seconds", "wall_seconds"}


@given(st.integers(2, 6), st.integers(0, 100))
def test_every_arm_runs_once_a_block_and_takes_every_place_in_turn(arms: int, start: int) -> None:
    names = tuple(f"arm {i}" for i in range(arms))
    turns = [order(names, block) for block in range(start * 2 * arms, (start + 1) * 2 * arms)]
    assert all(sorted(turn) == sorted(names) for turn in turns)
    for place in range(arms):
        assert sorted(turn[place] for turn in turns) == sorted(names * 2)


def test_short_arms_are_called_until_the_clock_can_see_them_and_a_long_one_once_a_block() -> None:
    calls = []

    def long() -> None:
        calls.append("long")
        time.sleep(0.02)

    arms = {"short": lambda: calls.append("short"), "long": long}
    paired_ratios(arms, baseline="short", phase="decode", blocks=3)
    assert calls.count("short") > 300
    assert calls.count("long") == 2 + 3


def test_cpu_time_does_not_count_sleep() -> None:
    start = process_clock()
    time.sleep(0.05)
    end = process_clock()
    assert end.wall - start.wall >= 0.05
    assert end.cpu - start.cpu < 0.04


def test_threads_are_put_back_even_after_an_error() -> None:
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with threads(before + 1):
            inside.append(torch.get_num_threads())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "change, named",
    [({"baseline": "c"}, "baseline='c'"), ({"phase": "nap"}, "phase='nap'"), ({"blocks": 0}, "blocks=0")],
)
def test_a_bad_request_is_refused_before_anything_runs(change: dict[str, object], named: str) -> None:
    def never() -> None:
        raise AssertionError("ran")

    asked: dict[str, object] = {"baseline": "a", "phase": "forward"}
    with pytest.raises(ValueError, match=named):
        paired_ratios({"a": never, "b": never}, **(asked | change))  # type: ignore[arg-type]


def test_the_interval_of_a_median_is_that_of_its_order_statistics() -> None:
    assert of_median([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]) == (2.0, 9.0)
    assert of_median([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)


def test_few_samples_get_the_wider_interval_of_student() -> None:
    low, high = of_median([1.0, 1.1, 1.21]) or (0.0, 0.0)
    # Logarithms are 0, d, 2d: mean d, standard error d / sqrt 3, t at 97.5% with 2 degrees of freedom 4.3027.
    half = 4.3027 / 3**0.5
    assert (low, high) == pytest.approx((1.1 ** (1 - half), 1.1 ** (1 + half)), rel=1e-4)
    assert of_median([1.0]) is None


def test_a_time_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        of_median([0.0, 1.0])
