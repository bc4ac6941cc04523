"""What counts as a replicate decides what an interval is worth: blocks of one process share its luck, processes do not.

time of a block = luck of its process x noise of the block, both log-normal; the true ratio is 1
"""

import math

import numpy as np
import pytest
from scipy import stats

from ablations.attention_sparsity import FITTED, exponent
from bench.interval import of_median
from bench.measurement import Measurement
from bench.replicate import across_processes
from bench.speed import rate
from dsv3.moe.load import drop_floor, uniform_counts
from tests.statistics.bounds import Bounds, median_bounds, t_bounds
from tests.statistics.draws import Numbers, chance, record

TRIALS = 10_000
NOISE = 0.05  # of a block
LUCK = (0.01, 0.03, 0.05)  # of a process
ONE_PROCESS = {7: (97.4, 88.7, 74.8), 30: (87.2, 53.8, 35.0)}  # blocks: percent that cover, by luck
ACROSS = {2: 95, 3: 95, 5: 95, 6: 96.9, 10: 97.9}  # processes: percent that cover, whatever their luck


def times(luck: float, processes: int, blocks: int) -> Numbers:
    """Ratios of the blocks of each process, in every trial."""
    random = np.random.default_rng([processes, blocks])
    shared = luck * random.standard_normal((TRIALS, processes, 1))
    found: Numbers = np.exp(shared + NOISE * random.standard_normal((TRIALS, processes, blocks)))
    return found


def covers(bounds: Bounds, truth: float = 1.0) -> float:
    low, high = bounds
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("blocks", ONE_PROCESS)
def test_the_interval_over_blocks_of_one_process_misses_the_truth_once_processes_differ(blocks: int) -> None:
    found = [covers(median_bounds(times(luck, 1, blocks)[:, 0])) for luck in LUCK]
    print(f"one process, {blocks} blocks: " + ", ".join(f"{100 * share:.1f}" for share in found))
    for share, stated in zip(found, ONE_PROCESS[blocks], strict=True):
        assert share == pytest.approx(stated / 100, abs=math.sqrt(2) * chance(share, TRIALS))
    assert found[-1] < 0.8


@pytest.mark.parametrize("processes", ACROSS)
def test_the_interval_across_processes_holds_the_truth_however_much_they_differ(processes: int) -> None:
    for luck in LUCK:
        share = covers(median_bounds(np.median(times(luck, processes, 7), axis=2)))
        print(f"{processes} processes, luck of {luck:.0%}: {100 * share:.1f}")
        assert share >= 0.95 - chance(0.95, TRIALS)
        assert share == pytest.approx(ACROSS[processes] / 100, abs=chance(0.95, TRIALS))


@pytest.mark.parametrize("processes", ACROSS)
def test_what_is_simulated_across_processes_is_what_the_project_computes(processes: int) -> None:
    blocks = times(0.03, processes, 7)
    low, high = median_bounds(np.median(blocks, axis=2))
    for trial in range(5):
        runs = [[record(float(np.median(ratios)), noise="absolute", n=7, over="blocks")] for ratios in blocks[trial]]
        (joined,) = across_processes(runs)
        assert joined.interval == pytest.approx((low[trial], high[trial]), rel=1e-9)


def test_a_rate_covers_as_often_as_its_time() -> None:
    for samples in times(0.03, 1, 7)[:50, 0].tolist():
        low, high = of_median(samples) or (0.0, 0.0)
        middle = sorted(samples)[3]
        speed = rate(Measurement(metric="wall_seconds", value=middle, interval=(low, high)), "tokens_per_second", 10)
        assert speed.interval is not None
        assert (speed.interval[0] <= 10 <= speed.interval[1]) == (low <= 1.0 <= high)


@pytest.mark.parametrize("seeds", [2, 6])
def test_the_interval_of_an_exponent_holds_the_true_one(seeds: int) -> None:
    """Times grow as n^1.5 with 5% of noise and 20% of luck per process, which moves the line and not its slope."""
    random = np.random.default_rng(seeds)
    lengths = np.log(np.array(FITTED, dtype=float))
    luck = 0.2 * random.standard_normal((TRIALS, seeds, 1))
    logs = 1.5 * lengths + luck + NOISE * random.standard_normal((TRIALS, seeds, len(FITTED)))
    centred = lengths - lengths.mean()
    low, high = t_bounds(logs @ centred / (centred @ centred))
    assert covers((low, high), 1.5) == pytest.approx(0.95, abs=chance(0.95, TRIALS))
    for trial in range(5):
        rows = [
            record(
                math.exp(time), metric="cpu_seconds", seed=seed, axes={"phase": "forward", "threads": 1, "length": n}
            )
            for seed, line in enumerate(logs[trial])
            for n, time in zip(FITTED, line, strict=True)
        ]
        found = exponent(rows, "a", FITTED)
        assert (found.low, found.high) == pytest.approx((low[trial], high[trial]), rel=1e-6)


@pytest.mark.parametrize("experts, k, tokens, factor", [(8, 2, 256, 1.0), (64, 4, 1024, 1.25), (128, 2, 4096, 1.2)])
def test_the_floor_of_drops_is_the_exact_mean_within_its_monte_carlo_error(
    experts: int, k: int, tokens: int, factor: float
) -> None:
    """Of tokens that pick k distinct experts at random, as many choose one expert as a binomial law says."""
    capacity = math.ceil(tokens * k / experts * factor)
    above = np.arange(capacity, tokens + 1)
    exact = float((above - capacity) @ stats.binom.pmf(above, tokens, k / experts)) * experts / (tokens * k)
    draws = np.maximum(uniform_counts(experts, k, tokens) - capacity, 0).sum(axis=1) / (tokens * k)
    error = draws.std() / math.sqrt(len(draws))
    floor = drop_floor(experts, k, tokens, capacity)
    print(f"drop floor {floor:.5f}, exactly {exact:.5f}, standard error {error:.5f}")
    assert abs(floor - exact) < 4 * error
    assert error < 0.1 * exact  # "times the floor" is good to a tenth where it drops one in a thousand
