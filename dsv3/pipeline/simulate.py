"""When each step of a plan happens, given how long things take: an event simulation without events' usual randomness.

A step starts when its rank is free and everything it needs has arrived:

    start = max(end of the rank's step before, max over needs (end of the need + hop if it comes from another rank))
    end = start + duration

`Times` are per device: f, b and w are the time that one microbatch's forward, input gradient and weight gradient take
on one device if the model is spread evenly. A stage takes f * ranks / stages, so schedules that cut the same model into
more stages do the same work, m (f + b + w) per device. A message takes `hop` on its way and no time of a rank. A pair
takes `pair`, and sends both of its results when it ends, as DeepSeek's and torch's runtimes do.
"""

from dataclasses import dataclass

from dsv3.config.rules import require, require_number
from dsv3.pipeline.order import run_order
from dsv3.pipeline.plan import Action, Pair, Plan, Result, Step


@dataclass(frozen=True, kw_only=True)
class Times:
    """Time of one microbatch on one device, in any one unit.

    f, b, w   forward, input gradient, weight gradient; a full backward takes b + w
    pair      an overlapped forward and backward, F&B in DeepSeek's table; None: f + b + w, no computation saved
    hop       from the end of a step on one rank to the start of the step on another that needs it
    load      cost of each stage relative to the mean, () for even stages
    """

    f: float = 1.0
    b: float = 1.0
    w: float = 1.0
    pair: float | None = None
    hop: float = 0.0
    load: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("f", "b", "w", "hop"):
            require_number(self, name, low=0.0)
        rule = "must not all be 0"
        require(self.f + self.b + self.w > 0, "f, b, w", (self.f, self.b, self.w), rule, "give one of them a time")
        if self.pair is not None:
            require_number(self, "pair", low=0.0)
        require(all(x >= 0 for x in self.load), "load", self.load, "must not be negative", "give relative costs")

    def of(self, step: Step, share: float = 1.0) -> float:
        """How long a step takes where a stage is `share` of what a device holds of the model."""
        if isinstance(step, Pair) and self.pair is not None:
            mean = sum(self._load(action) for action in step.actions) / 2
            return self.pair * share * mean
        cost = {"F": self.f, "I": self.b, "W": self.w, "B": self.b + self.w}
        return sum(cost[action.kind] * self._load(action) for action in step.actions) * share

    def _load(self, action: Action) -> float:
        return self.load[action.stage] if self.load else 1.0


@dataclass(frozen=True, slots=True)
class Span:
    """A step and when it ran."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a plan does under given times: the spans of each rank, in order."""

    plan: Plan
    times: Times
    rows: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """From the first start to the last end of all ranks."""
        return max(row[-1].end for row in self.rows) - min(row[0].start for row in self.rows)


def simulate(plan: Plan, times: Times, release: tuple[float, ...] | None = None) -> Timeline:
    """Run a plan on paper; rank r starts no earlier than `release[r]` (default: all at 0).

    Raises:
        ValueError: if the plan stands still, or `times.load` has not one entry per stage.
    """
    stages, share = plan.stages, plan.ranks / plan.stages
    counted = len(times.load) in (0, stages)
    require(counted, "load", times.load, f"must have one entry per stage, {stages}", "or leave it empty")
    free = list(release or (0.0,) * plan.ranks)
    done: dict[Result, tuple[int, float]] = {}
    rows: list[list[Span]] = [[] for _ in range(plan.ranks)]
    for rank, step in run_order(plan):
        start = free[rank]
        for action in step.actions:
            for source, end in (done[need] for need in action.needs(stages)):
                start = max(start, end if source == rank else end + times.hop)
        free[rank] = start + times.of(step, share)
        done |= {result: (rank, free[rank]) for action in step.actions for result in action.results}
        rows[rank].append(Span(step, start, free[rank]))
    return Timeline(plan, times, tuple(map(tuple, rows)))
