"""How much time a plan leaves unused, and what it holds in memory meanwhile.

"The bubble" has several definitions that differ by more than the schedules do, so all of them are computed:

    idle           a rank's time without work inside the makespan (first start to last end over all ranks), per rank
    idle_share     total idle / (ranks x makespan)               "bubble time", as profilers show it
    idle_to_ideal  total idle / total work                       (p - 1) / m for 1F1B, as papers write it
    span_share     idle time from a rank's own first start to its own last end / that span, mean over ranks: what is
                   left if ranks need not wait for the first and the last of them
    steady_share   1 - work of the busiest rank / period, where the period is the time per step when steps follow each
                   other without a barrier for ever

A rank holds the activations of a microbatch from the start of its F to the end of its W (or B): I frees nothing. One
microbatch counts 1 if it lives in 1/p of the model, so a stage of a model in v chunks per rank counts 1/v.
"""

from dataclasses import dataclass

from dsv3.pipeline.plan import Plan
from dsv3.pipeline.simulate import Timeline, Times, simulate


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """Unused time of one step, in the unit of the timeline's `Times` or as a share."""

    makespan: float
    work: tuple[float, ...]
    idle: tuple[float, ...]
    idle_share: float
    idle_to_ideal: float
    span_share: float


def bubble(timeline: Timeline) -> Bubble:
    """Measure one step."""
    work = tuple(sum(span.end - span.start for span in row) for row in timeline.rows)
    spans = [row[-1].end - row[0].start for row in timeline.rows]
    makespan = timeline.makespan
    idle = tuple(makespan - busy for busy in work)
    return Bubble(
        makespan=makespan,
        work=work,
        idle=idle,
        idle_share=sum(idle) / (len(idle) * makespan),
        idle_to_ideal=sum(idle) / sum(work),
        span_share=1 - sum(busy / span for busy, span in zip(work, spans, strict=True)) / len(work),
    )


def steady_period(plan: Plan, times: Times) -> float:
    """Time per step when steps follow each other for ever and a rank starts its next one as soon as it can.

    The end of one step is the start of the next, rank by rank, so steps compose as matrices in max-plus algebra and
    the period is the eigenvalue, the largest mean of a cycle of ranks (Karp 1978): with x_k the ends after k steps,
    max over ranks of min over k < n of (x_n - x_k) / (n - k), n ranks.
    """
    ends = [(0.0,) * plan.ranks]
    for _ in range(plan.ranks):
        ends.append(tuple(row[-1].end for row in simulate(plan, times, ends[-1]).rows))
    last = len(ends) - 1
    return max(min((ends[last][r] - ends[k][r]) / (last - k) for k in range(last)) for r in range(plan.ranks))


def steady_share(plan: Plan, times: Times) -> float:
    """Idle share of the busiest rank when steps follow each other without a barrier."""
    work = bubble(simulate(plan, times)).work
    return 1 - max(work) / steady_period(plan, times)


def activations(timeline: Timeline) -> tuple[tuple[tuple[float, float], ...], ...]:
    """For each rank, (time, microbatches held from then on), one entry per change."""
    weight = timeline.plan.ranks / timeline.plan.stages
    rows = []
    for row in timeline.rows:
        taken = [(span.start, +1) for span in row for action in span.step.actions if action.kind == "F"]
        freed = [(span.end, -1) for span in row for action in span.step.actions if action.kind in "WB"]
        held, changes = 0, []
        for time, change in sorted(taken + freed):
            held += change
            changes.append((time, held * weight))
        rows.append(tuple(changes))
    return tuple(rows)


def peak_activations(timeline: Timeline) -> tuple[float, ...]:
    """The most microbatches each rank holds at once."""
    return tuple(max(held for _, held in row) for row in activations(timeline))
