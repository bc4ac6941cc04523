"""Pipeline schedules as values, without torch: a `Plan` says who does what in which order, and four readers use it.

schedules/    generators: (ranks, microbatches) -> Plan
plan.py       Plan, its actions `0F1` and pairs, and its text form
order.py      in which order a plan can happen, or where it stands still
validate.py   is it a training step, under this kind of send?
simulate.py   (plan, times) -> Timeline
bubble.py     idle time by every definition, and activations held
formulas.py   the closed forms that the simulator meets
catalogue.py  SCHEDULES: each generator with its closed forms
draw.py       a timeline as a picture (imports matplotlib, so it is not imported here)

timeline = simulate(one_f_one_b(ranks=4, microbatches=8), Times())
bubble(timeline).idle_share         # 0.2727
"""

from dsv3.pipeline.bubble import Bubble, activations, bubble, peak_activations, steady_period, steady_share
from dsv3.pipeline.catalogue import SCHEDULES, Schedule, named
from dsv3.pipeline.plan import Action, Pair, Plan, parse
from dsv3.pipeline.schedules import (
    dual_pipe,
    dual_pipe_v,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    zero_bubble_h1,
)
from dsv3.pipeline.simulate import Timeline, Times, simulate
from dsv3.pipeline.validate import validate

__all__ = [
    "SCHEDULES",
    "Action",
    "Bubble",
    "Pair",
    "Plan",
    "Schedule",
    "Timeline",
    "Times",
    "activations",
    "bubble",
    "dual_pipe",
    "dual_pipe_v",
    "gpipe",
    "interleaved_one_f_one_b",
    "named",
    "one_f_one_b",
    "parse",
    "peak_activations",
    "simulate",
    "steady_period",
    "steady_share",
    "validate",
    "zero_bubble_h1",
]
