"""Cases of the pipeline schedules: idle slots of a step, simulated and by closed form, and activations held.

Nothing is raced here: the figures are counts, equal on every run, and the gate holds them. A slot is the time of one
forward; the input gradient and the weight gradient take one each, messages none. pytest-benchmark's JSON has the time
that the simulator itself takes.
"""

from collections.abc import Callable
from typing import Any

import pytest

from bench.cases import Run
from bench.measurement import Measurement, Point
from dsv3.pipeline import SCHEDULES, Schedule, Times, bubble, peak_activations, simulate, validate

# Shapes that suit all schedules: small, that of DeepSeek's drawing of DualPipe, and DeepSeek-V3's 16 ranks.
SHAPES = ((4, 8), (8, 20), (16, 128))
SLOT = Times(f=1, b=1, w=1)


@pytest.mark.parametrize("ranks, microbatches", SHAPES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def bench_schedule(
    keep: Callable[..., None], run: Run, benchmark: Any, schedule: Schedule, ranks: int, microbatches: int
) -> None:
    """One schedule at one shape: its plan is valid, and its simulation meets the closed form."""
    plan = schedule.plan(ranks, microbatches)
    axes = {"ranks": ranks, "microbatches": microbatches}
    timeline = benchmark.pedantic(simulate, args=(plan, SLOT), rounds=1)
    slots = sum(bubble(timeline).idle)
    formula = ranks * schedule.idle(ranks, microbatches, SLOT)
    try:
        validate(plan)
        # Slots and their halves are exact in binary.
        assert slots == formula, f"simulated {slots} idle slots, the closed form gives {formula}"
    except (AssertionError, ValueError) as error:
        point = Point(study=__name__.rpartition(".")[2], arm=schedule.name, axes=axes | {"device": run.device})
        run.keep_failures(point, ("bubble_slots", "peak_activations"), f"{type(error).__name__}: {error}")
        raise
    found = {
        "bubble_slots": slots,
        "bubble_slots_formula": formula,
        "bubble_share": bubble(timeline).idle_share,
        "peak_activations": max(peak_activations(timeline)),
    }
    keep(schedule.name, [Measurement(metric=name, value=value) for name, value in found.items()], axes=axes)
