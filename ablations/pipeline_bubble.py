"""How much of a pipeline's time each schedule leaves idle, what it holds in memory for that, and where 12% is reached.

Every figure is a count: a plan is simulated in slots of one forward, with the input and the weight gradient a slot each
(backward twice forward), equal stages and free messages, and must meet the closed form of the schedule's paper or the
point fails. `bubble_share` is idle time / time, (p - 1) / (m + p - 1) for 1F1B over p ranks and m microbatches;
`bubble_to_ideal` is idle time / work, (p - 1) / m, which papers also call the bubble.

Usual numbers of microbatches start at 4 per rank: from there on GPipe's paper calls the bubble negligible (arXiv
1811.06965, section 2.3). DeepSeek-V3's shape is 16 ranks (arXiv 2412.19437, section 3.2); 15360 sequences over
2048 / 16 pipelines give each 120, which we take as one per microbatch, a size that is not published.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ablations.claims import Claim, Verdict
from ablations.evidence import Estimate, NoEvidence, decide, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Rule, Study, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.pipeline import (
    SCHEDULES,
    Plan,
    Schedule,
    Times,
    bubble,
    named,
    peak_activations,
    simulate,
    steady_share,
    validate,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

RANKS = (4, 8, 16)
USUAL = 4  # microbatches per rank
CLAIMED = Fraction(12, 100)
DEEPSEEK = (16, 120)
MEASURED = 2.06 / 19.926  # of a step's seconds, arXiv 2505.09343, table 4
DRAWN = ((4, 8), (8, 20))
SLOT = Times(f=1, b=1, w=1)


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A cell per number of ranks; exact figures need no seeds, and both profiles ask the same."""
    return grid(seconds=2, timed=False, ranks=RANKS)


def measure(cell: Cell) -> list[Reading]:
    """Every schedule at every number of microbatches for which it is defined."""
    ranks = int(cell.axes["ranks"])
    readings = []
    for schedule in SCHEDULES:
        for microbatches in sweep(ranks):
            try:
                plan = schedule.plan(ranks, microbatches)
            except ValueError:
                continue  # some schedules ask for even numbers or full rounds: that point has no such plan
            readings += _read(schedule, plan)
    return readings


def sweep(ranks: int) -> tuple[int, ...]:
    """The numbers of microbatches looked at: powers of two per rank, the fewest with which 1F1B idles 12% by either
    definition, and the shapes that are drawn or DeepSeek's.
    """
    powers = {ranks * factor for factor in (1, 2, 4, 8)}
    named_shapes = {m for p, m in (DEEPSEEK, *DRAWN) if p == ranks}
    return tuple(sorted(powers | named_shapes | set(fewest(ranks))))


def fewest(ranks: int) -> tuple[int, int]:
    """The fewest microbatches with which 1F1B idles at most 12%: of its time, and of its work."""
    of_work = (ranks - 1) / CLAIMED
    return math.ceil(of_work * (1 - CLAIMED)), math.ceil(of_work)


def _read(schedule: Schedule, plan: Plan) -> list[Reading]:
    axes = {"microbatches": plan.microbatches}
    timeline = simulate(plan, SLOT)
    found = bubble(timeline)
    formula = schedule.idle(plan.ranks, plan.microbatches, SLOT)
    try:
        validate(plan)
        # Slots and their halves are exact in binary.
        assert max(found.idle) == formula, f"a rank idles {max(found.idle)} slots, the closed form says {formula}"
    except (AssertionError, ValueError) as error:
        return [Reading(arm=schedule.name, metric="bubble_share", failed=str(error), axes=axes)]
    values: dict[str, float] = {
        "bubble_share": found.idle_share,
        "bubble_to_ideal": found.idle_to_ideal,
        "peak_activations": max(peak_activations(timeline)),
    }
    if plan.microbatches == USUAL * plan.ranks:
        values["bubble_slots"] = sum(found.idle)
        values["bubble_slots_formula"] = plan.ranks * formula
        values["bubble_share_span"] = found.span_share
        values["bubble_share_steady"] = steady_share(plan, SLOT)
    return [
        Reading(arm=schedule.name, measurement=Measurement(metric=name, value=value), axes=axes)
        for name, value in values.items()
    ]


def one_f_one_b_reaches(claim: Claim, records: Sequence[Record]) -> Verdict:
    """E2 at the fewest usual microbatches, over all numbers of ranks; the words say from how many on it holds."""
    shares = [_share(records, "one_f_one_b", ranks, USUAL * ranks) for ranks in RANKS]
    # The figures are exact, so what takes an interval's place is their range over the ranks that the claim leaves open.
    found = Estimate(shares[len(shares) // 2], min(shares), max(shares), 1)
    needed = " / ".join(str(fewest(ranks)[0]) for ranks in RANKS)
    as_work = " / ".join(str(fewest(ranks)[1]) for ranks in RANKS)
    ours = _share(records, "one_f_one_b", *DEEPSEEK)
    answer = (
        f"With {USUAL} microbatches per rank 1F1B idles {min(shares):.1%} to {max(shares):.1%} of rank-time on "
        f"{' / '.join(map(str, RANKS))} ranks; 12% takes at least {needed} microbatches there ({as_work} if idle time "
        f"is counted against work instead of time). On DeepSeek-V3's shape, {DEEPSEEK[0]} ranks and {DEEPSEEK[1]} "
        f"microbatches, it would idle {ours:.1%}. GPipe idles exactly as much: 1F1B saves memory, not time."
    )
    return decide(found, answer, at_most=claim.most)


def answer(records: Sequence[Record]) -> str:
    """The schedules side by side: at the fewest usual microbatches and at DeepSeek-V3's shape."""
    ranks, microbatches = DEEPSEEK
    usual = ", ".join(f"{arm} {_share(records, arm, ranks, USUAL * ranks):.1%}" for arm in _names())
    there = [arm for arm in _names() if arm != "interleaved_one_f_one_b"]
    deepseek = ", ".join(f"{arm} {_share(records, arm, ranks, microbatches):.1%}" for arm in there)
    held = {arm: _held(records, arm, ranks, microbatches) for arm in ("one_f_one_b", "dual_pipe")}
    return (
        f"On {ranks} ranks with {USUAL} microbatches per rank, idle: {usual}. With DeepSeek-V3's {microbatches} "
        f"microbatches: {deepseek}; the fullest rank then holds {held['one_f_one_b']:g} microbatches under 1F1B and "
        f"{held['dual_pipe']:g} under DualPipe, which also stores the weights twice. DeepSeek's published step idles "
        f"{MEASURED:.1%}."
    )


def _names() -> list[str]:
    return [schedule.name for schedule in SCHEDULES]


def _share(records: Sequence[Record], arm: str, ranks: int, microbatches: int) -> float:
    return estimate(records, arm=arm, metric="bubble_share", ranks=ranks, microbatches=microbatches).value


def _held(records: Sequence[Record], arm: str, ranks: int, microbatches: int) -> float:
    return estimate(records, arm=arm, metric="peak_activations", ranks=ranks, microbatches=microbatches).value


def gantt(schedules: Sequence[str], ranks: int, microbatches: int) -> Callable[[Any], "Picture"]:
    """A picture of these schedules' timelines; none unless the records have measured each, and as the picture says."""

    def draw(table: Any) -> "Picture":
        from dsv3.pipeline.draw import figure

        timelines = [simulate(named(name).plan(ranks, microbatches), SLOT) for name in schedules]
        for name, timeline in zip(schedules, timelines, strict=True):
            rows = table[(table["arm"] == name) & (table["metric"] == "bubble_share")]
            rows = rows[(rows["ranks"] == ranks) & (rows["microbatches"] == microbatches)]
            if rows.empty:
                raise NoEvidence(f"no record of {name} on {ranks} ranks with {microbatches} microbatches yet")
            said, drawn = rows["value"].iloc[0], bubble(timeline).idle_share
            assert said == drawn, f"{name}: the records say {said}, the picture shows {drawn}; run the study again"
        return figure(timelines)

    return draw


def _listed(which: int) -> str:
    return " / ".join(str(fewest(ranks)[which]) for ranks in RANKS)


STUDY = Study(
    name="pipeline_bubble",
    question="How much time does each pipeline schedule leave idle, at what memory, and where is 12% reached?",
    arms=tuple(Arm(schedule.name, schedule.about) for schedule in SCHEDULES),
    baseline="one_f_one_b",
    metrics=(
        "bubble_share",
        "bubble_to_ideal",
        "peak_activations",
        "bubble_slots",
        "bubble_slots_formula",
        "bubble_share_span",
        "bubble_share_steady",
    ),
    seeds={"quick": 1, "full": 1},
    cells=cells,
    measure=measure,
    rules=(Rule("E2", seeds=0, judge=one_f_one_b_reaches),),
    figures=(
        Figure(
            "gantt",
            "A step on 4 ranks with 8 microbatches: GPipe and 1F1B idle alike, splitting the backward fills the drain",
            draw=gantt([schedule.name for schedule in SCHEDULES], *DRAWN[0]),
        ),
        Figure(
            "share_at_16_ranks",
            "Idle share of time on 16 ranks",
            metric="bubble_share",
            x="microbatches",
            where={"ranks": 16},
            log="x",
            reference=(float(CLAIMED), "claimed of 1F1B: 12%"),
        ),
        Figure(
            "share_at_4_ranks",
            "Idle share of time on 4 ranks",
            metric="bubble_share",
            x="microbatches",
            where={"ranks": 4},
            log="x",
            reference=(float(CLAIMED), "claimed of 1F1B: 12%"),
        ),
        Figure(
            "activations_at_16_ranks",
            "Microbatches that the fullest of 16 ranks holds",
            metric="peak_activations",
            x="microbatches",
            where={"ranks": 16},
            log="xy",
        ),
        Figure(
            "dual_pipe",
            "DualPipe on the shape of DeepSeek's own drawing: 8 ranks, 20 microbatches",
            draw=gantt(["dual_pipe"], *DRAWN[1]),
        ),
    ),
    answer=answer,
    limits=(
        "Stages are equal, messages free and no rank is ever late: a real step idles more than its schedule.",
        "An overlapped pair takes as long as its forward and backward in turn. What DualPipe gains by hiding its "
        "messages behind computation is not in these figures.",
        f"DeepSeek's {MEASURED:.1%} is measured on hardware, over a number of microbatches that is not published: it "
        "does not test the simulated share.",
        f"The fewest microbatches with which 1F1B idles 12% are arithmetic: {_listed(0)} for its time and {_listed(1)} "
        f"for its work, on {' / '.join(map(str, RANKS))} ranks; simulated plans meet them.",
        "Activations count microbatches, not bytes; an input gradient frees none of them here.",
        "A missing cell: the schedule is not defined for that number of microbatches.",
    ),
)
