"""The schedules that dsv3 compares, each with its plan and the closed forms that its plan must meet.

A new schedule is a generator and a row here; its contract tests, bench case and place in the study follow from the row.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dsv3.pipeline import formulas
from dsv3.pipeline.plan import Plan
from dsv3.pipeline.schedules import (
    dual_pipe,
    dual_pipe_v,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    zero_bubble_h1,
)
from dsv3.pipeline.simulate import Times


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A way to fill a pipeline of p ranks with m microbatches.

    plan    (p, m) -> Plan; raises ValueError where p and m do not suit it
    idle    (p, m, times) -> idle time of the rank that idles most, in closed form; ValueError outside its domain
    peak    (p, m) -> microbatches that the fullest rank holds, in closed form
    about   what it does, in a line
    """

    name: str
    plan: Callable[[int, int], Plan]
    idle: Callable[[int, int, Times], float]
    peak: Callable[[int, int], float]
    about: str


SCHEDULES: tuple[Schedule, ...] = (
    Schedule(
        name="gpipe",
        plan=gpipe,
        idle=lambda p, m, times: formulas.flush_idle(p, times),
        peak=lambda p, m: m,
        about="every forward, then every backward",
    ),
    Schedule(
        name="one_f_one_b",
        plan=one_f_one_b,
        idle=lambda p, m, times: formulas.flush_idle(p, times),
        peak=min,
        about="a forward and a backward in turn",
    ),
    Schedule(
        name="interleaved_one_f_one_b",
        plan=interleaved_one_f_one_b,
        idle=lambda p, m, times: formulas.interleaved_idle(p, m, times, chunks=2),
        peak=lambda p, m: formulas.interleaved_peak(p, m, chunks=2),
        about="1F1B over two smaller stages per rank",
    ),
    Schedule(
        name="zero_bubble_h1",
        plan=zero_bubble_h1,
        idle=formulas.zero_bubble_h1_idle,
        peak=min,
        about="1F1B whose weight gradients wait and fill the drain",
    ),
    Schedule(
        name="dual_pipe",
        plan=dual_pipe,
        idle=lambda p, m, times: formulas.dual_pipe_idle(p, times),
        peak=lambda p, m: p + 1,
        about="microbatches enter at both ends; weights stored twice",
    ),
    Schedule(
        name="dual_pipe_v",
        plan=dual_pipe_v,
        idle=lambda p, m, times: formulas.dual_pipe_v_idle(p, times),
        peak=lambda p, m: p + 0.5,
        about="DualPipe folded: each rank holds a stage of the way in and one of the way out",
    ),
)


def named(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        ValueError: for a name that is not listed.
    """
    for schedule in SCHEDULES:
        if schedule.name == name:
            return schedule
    raise ValueError(f"schedule={name!r}: must be one of {', '.join(s.name for s in SCHEDULES)}; pick one of these")
