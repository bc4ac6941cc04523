"""Peak bytes, live bytes, allocations and their bytes, of tensor memory in one call, to the byte.

On a CPU torch's profiler reports every block that tensors take and give back. The sum of those events inside the call,
started at zero, has the peak. Two rules make it exact: the profile opens before the state is built, since a block taken
earlier is missing when it is freed, and the call runs once before, so that what it allocates only the first time
(optimizer state, caches) is there. On a GPU the caching allocator counts the same by itself.

The resident set size of the process tells none of this: the C allocator keeps freed pages, so a second call reads 0.
"""

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.measurement import Measurement

State = TypeVar("State")
_REGION = "bench.meters.memory"


def memory(
    build: Callable[[], State], call: Callable[[State], object], *, device: torch.device | str = "cpu"
) -> tuple[Measurement, Measurement, Measurement, Measurement]:
    """Peak bytes above the start of `call(build())`, the same with the state, blocks taken, and the bytes of all of
    these, given back or not; after one warm-up call.

    `build` must make all state anew, model, optimizer and inputs; what the call returns is dropped.
    """
    measured = _on_gpu if torch.device(device).type == "cuda" else _on_cpu
    peak, live, blocks, taken = measured(build, call)
    return (
        Measurement(metric="peak_bytes", value=peak),
        Measurement(metric="live_bytes", value=live + peak),
        Measurement(metric="allocations", value=blocks),
        Measurement(metric="taken_bytes", value=taken),
    )


def peak_bytes(
    build: Callable[[], State], call: Callable[[State], object], *, device: torch.device | str = "cpu"
) -> tuple[Measurement, Measurement, Measurement]:
    """Peak bytes above the start, the same with the state, and blocks taken: the first three of `memory`."""
    return memory(build, call, device=device)[:3]


def peak_of(changes: Iterable[int]) -> int:
    """Highest running sum of bytes taken (positive) and given back (negative), never below the start's zero."""
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _on_cpu(build: Callable[[], State], call: Callable[[State], object]) -> tuple[int, int, int, int]:
    """Peak, live before, blocks taken, and their bytes."""
    gc.collect()  # what earlier work left must not be freed inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = build()
        call(state)
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with record_function(_REGION):
                call(state)
        finally:
            if was_enabled:
                gc.enable()
    assert profiler.profiler is not None, "the profiler ran"
    events = profiler.profiler.kineto_results.events()
    region = next(event for event in events if event.name() == _REGION)
    start, end = region.start_ns(), region.start_ns() + region.duration_ns()
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    # A stable sort by time alone: events of the same nanosecond keep the order in which they were reported.
    changes = [size for at, size in sorted(memory, key=lambda event: event[0]) if start <= at <= end]
    live = sum(size for at, size in memory if at < start)
    taken = [change for change in changes if change > 0]
    return peak_of(changes), live, len(taken), sum(taken)


def _on_gpu(build: Callable[[], State], call: Callable[[State], object]) -> tuple[int, int, int, int]:
    before = torch.cuda.memory_allocated()
    state = build()
    call(state)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    live = torch.cuda.memory_allocated()
    counted = torch.cuda.memory_stats()
    call(state)
    torch.cuda.synchronize()
    blocks, size = (
        torch.cuda.memory_stats()[name] - counted[name]
        for name in ("allocation.all.allocated", "allocated_bytes.all.allocated")
    )
    return torch.cuda.max_memory_allocated() - live, live - before, blocks, size
