"""The traced step on real memory, at sizes that fit: its true peak, and the operators that take memory inside
themselves, which no trace sees.

    scratch of an operator = highest sum of bytes taken inside one call of it - what it leaves behind
"""

import gc
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler logs every start and stop

from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bench.budget.activations import Policy
from bench.budget.states import Recipe
from bench.budget.traced import Step, build
from bench.meters.memory import peak_bytes, peak_of
from bench.meters.paired import threads
from dsv3.config import Config

MARK = "operator "


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """The step's highest sum of live bytes by the allocator, state included, and scratch by operator, largest first."""

    peak: int
    scratch: Mapping[str, int]


def allocated(
    config: Config, recipe: Recipe, *, sequences: int = 1, policy: Policy = "none", accumulating: bool = False
) -> Allocated:
    """Run the step twice on real memory, at one thread, and read the second."""

    def make() -> Step:
        step = build(config, recipe, sequences=sequences, policy=policy)
        if accumulating:
            step.zeroed_gradients()
        return step

    call = partial(whole, accumulating=accumulating)
    with threads(1):
        _, live, _ = peak_bytes(make, call)
        return Allocated(peak=int(live.value), scratch=scratch(make()))


def whole(step: Step, *, accumulating: bool = False) -> None:
    """Forward, backward and update; gradients are dropped at the end, unless they accumulate."""
    step.loss().backward()
    step.update()
    if not accumulating:
        step.forget()


def scratch(step: Step) -> dict[str, int]:
    """The largest scratch of each operator in one step, operators without any left out."""
    whole(step)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, _Marked():
        whole(step)
    assert profiler.profiler is not None, "the profiler ran"
    events = profiler.profiler.kineto_results.events()
    calls = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name().removeprefix(MARK))
        for event in events
        if event.name().startswith(MARK)
    )
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return _largest(calls, memory)


def _largest(calls: list[tuple[int, int, str]], memory: list[tuple[int, int]]) -> dict[str, int]:
    starts, inside = [call[0] for call in calls], [list[int]() for _ in calls]
    for at, size in memory:
        place = bisect_right(starts, at) - 1
        if place >= 0 and at <= calls[place][1]:
            inside[place].append(size)
    found: dict[str, int] = {}
    for (_, _, name), changes in zip(calls, inside, strict=True):
        extra = peak_of(changes) - max(sum(changes), 0)
        if extra > 0:
            found[name] = max(found.get(name, 0), extra)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class _Marked(TorchDispatchMode):
    """Names the time of each operator in the profile."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with record_function(f"{MARK}{func}"):
            return func(*args, **(kwargs or {}))
