"""Time of several arms, interleaved in one process: what remains comparable on a busy machine.

A machine's speed drifts with clocks, neighbours and heat, for all arms alike, so each block runs every arm once and
only ratios inside a block are used:

    ratio_b = time_b(arm) / time_b(baseline),    estimate = median over blocks, interval from its order statistics

The order turns and reverses from block to block (A B / B A), so that being first favours nobody. Two clocks are read:
process CPU time, which does not count waiting for a core and so decides at one thread, and wall time beside it.
Blocks of one process share its luck (memory layout, code alignment); `bench.replicate` joins fresh processes.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from bench.interval import of_median
from bench.measurement import Measurement

PHASES = ("forward", "forward_backward", "step", "decode")
_SHORTEST = 0.01  # seconds of a sample: a thousand times the cost of reading the clocks and of a timer interrupt


@dataclass(frozen=True)
class Seconds:
    """Both clocks' readings, or the difference of two readings."""

    cpu: float
    wall: float


Clock = Callable[[], Seconds]
Block = dict[str, Seconds]


def process_clock() -> Seconds:
    """CPU time of this process over all its threads, and wall time."""
    return Seconds(time.process_time(), time.perf_counter())


def cuda_clock() -> Seconds:
    """As `process_clock`, after the GPU has finished what it was given."""
    import torch

    torch.cuda.synchronize()
    return process_clock()


def order(names: tuple[str, ...], block: int) -> tuple[str, ...]:
    """The arms in the order of the given block: every second block backwards, the start moving on every second one."""
    start = block // 2 % len(names)
    turned = names[start:] + names[:start]
    return turned[::-1] if block % 2 else turned


def time_block(
    arms: Mapping[str, Callable[[], object]], block: int, calls: int | Mapping[str, int], clock: Clock
) -> Block:
    """Seconds per call of each arm, each run `calls` times, in the order of this block; garbage collection waits."""
    taken = {}
    gc.collect(1)  # what the last block left; the oldest generation is the libraries' and takes a tenth of a second
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for name in order(tuple(arms), block):
            count = calls if isinstance(calls, int) else calls[name]
            start = clock()
            for _ in range(count):
                arms[name]()
            end = clock()
            taken[name] = Seconds((end.cpu - start.cpu) / count, (end.wall - start.wall) / count)
    finally:
        if was_enabled:
            gc.enable()
    return taken


@dataclass(frozen=True)
class Plan:
    """How often to measure, fixed before the first figure: calls of each arm in a block, and blocks."""

    calls: Mapping[str, int]
    blocks: int


def plan(arms: Mapping[str, Callable[[], object]], *, least: int, seconds: float, clock: Clock = process_clock) -> Plan:
    """Warm every arm up with two calls, and plan from the second ones.

    Each arm is called until it lasts a hundredth of a second. `seconds` of blocks are run, at least `least` of
    them and at most 8 times as many: short arms are noisier, and more blocks of them cost little.
    """
    taken = {}
    for name, arm in arms.items():
        arm()
        start = clock()
        arm()
        taken[name] = max(clock().wall - start.wall, 1e-7)
    calls = {name: math.ceil(_SHORTEST / one) for name, one in taken.items()}
    fitting = int(seconds / sum(calls[name] * one for name, one in taken.items()))
    return Plan(calls=calls, blocks=min(max(least, fitting), 8 * least))


def ratios(blocks: list[Block], arm: str, baseline: str, which: str) -> tuple[float, ...]:
    """Per block, the arm's time over the baseline's, on the clock named "cpu" or "wall"."""
    return tuple(getattr(block[arm], which) / getattr(block[baseline], which) for block in blocks)


def ratio(blocks: list[Block], arm: str, baseline: str, phase: str, which: str) -> Measurement:
    """The median ratio of an arm to the baseline as metric `<phase>_<which>_ratio`, with its interval over blocks."""
    samples = ratios(blocks, arm, baseline, which)
    return over_blocks(f"{phase}_{which}_ratio", samples)


def seconds(blocks: list[Block], arm: str, which: str) -> Measurement:
    """The median time of one call of an arm as metric `<which>_seconds`, with its interval over blocks."""
    return over_blocks(f"{which}_seconds", tuple(getattr(block[arm], which) for block in blocks))


def paired_ratios(
    arms: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    phase: str,
    blocks: int = 7,
    clock: Clock = process_clock,
) -> dict[str, tuple[Measurement, ...]]:
    """Time the arms in alternated blocks after a warm-up: for each, the seconds and, but for the baseline, the ratios.

    Set the number of threads before (`threads(1)` where CPU time decides). The interval is that of a median from 6
    blocks on, Student's below.

    Raises:
        ValueError: a baseline that is no arm, an unknown phase, or no blocks.
    """
    if baseline not in arms:
        raise ValueError(f"baseline={baseline!r}: must be one of the arms {', '.join(arms)}")
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}: must be one of {', '.join(PHASES)}")
    if blocks < 1:
        raise ValueError(f"blocks={blocks!r}: must be at least 1; 7 give an interval of the median")
    calls = plan(arms, least=blocks, seconds=0.0, clock=clock).calls
    timed = [time_block(arms, block, calls, clock) for block in range(blocks)]
    return {arm: summary(timed, arm, baseline, phase) for arm in arms}


def summary(
    blocks: list[Block], arm: str, baseline: str, phase: str, clocks: tuple[str, ...] = ("cpu", "wall")
) -> tuple[Measurement, ...]:
    """Seconds of an arm on the given clocks, and its ratios to the baseline unless it is the baseline."""
    times = tuple(seconds(blocks, arm, which) for which in clocks)
    if arm == baseline:
        return times
    return (*times, *(ratio(blocks, arm, baseline, phase, which) for which in clocks))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads inside (None: as many as it does), with as many as before after."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def over_blocks(name: str, samples: tuple[float, ...]) -> Measurement:
    """The median of a metric's samples, one per block, with the interval of its order statistics."""
    return Measurement(
        metric=name,
        value=median(samples),
        n=len(samples),
        over="blocks",
        interval=of_median(samples),
        samples=samples,
    )
