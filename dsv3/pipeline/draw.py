"""A timeline as a picture: a row per rank, a bar per action, time to the right.

Colour says the kind of action, lightness which of its stages a rank works on: the lighter bars are the later chunk, the
way out of a V, or the stream that entered at the far end. A pair is two half-height bars in one frame. Numbers are
microbatches, left out where they would not fit. Hatched is idle. The hues are those of Okabe and Ito, which readers
with any of the common colour deficiencies can tell apart, and their lightness differs too.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3.pipeline.bubble import bubble
from dsv3.pipeline.plan import Action, Kind, Plan
from dsv3.pipeline.simulate import Span, Timeline

COLOURS: dict[Kind, str] = {"F": "#0072B2", "I": "#D55E00", "W": "#009E73", "B": "#E69F00"}
MEANING: dict[Kind, str] = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "backward (both)"}
LABELS = 8.5  # points
DIGITS = (6.8, 8.0)  # smallest and largest size of a microbatch number, in points
DIGIT_WIDTH = 0.62  # of the font's size, in DejaVu Sans
BAR = 0.82  # height of a bar, in rows


def draw(timeline: Timeline, axes: Axes, *, until: float | None = None, unit: str = "forwards") -> None:
    """Draw one timeline on `axes`; the time axis ends at `until`, so that pictures can be compared by eye.

    unit    what `Times` counted in; the label of the axis, "" for none
    """
    plan, end = timeline.plan, until or timeline.makespan
    axes.set(xlim=(0, end), ylim=(plan.ranks - 0.5, -0.5), yticks=range(plan.ranks))
    axes.set_xlabel(unit and f"time ({unit})", fontsize=LABELS)
    axes.set_yticklabels([f"rank {rank}" for rank in range(plan.ranks)], fontsize=LABELS)
    axes.set_title(_title(timeline), fontsize=LABELS + 1, loc="left")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=LABELS)
    axes.spines[["top", "right", "left"]].set_visible(False)
    size, room = _digits(timeline, axes, end)
    for rank, row in enumerate(timeline.rows):
        idle = Rectangle((0, rank - BAR / 2), timeline.makespan, BAR, fc="#f4f4f4", ec="#d0d0d0", hatch="////", lw=0)
        axes.add_patch(idle)
        for span in row:
            _draw_span(axes, plan, rank, span, size if span.end - span.start >= room else None)


def figure(timelines: Sequence[Timeline], *, width: float = 10.0, unit: str = "forwards") -> Figure:
    """Timelines under one another over one time axis, with a legend; `width` in inches."""
    row, title, foot = 0.31, 0.6, 0.65  # heights in inches
    height = sum(title + row * timeline.plan.ranks for timeline in timelines) + foot
    picture = Figure(figsize=(width, height), dpi=100)
    until = max(timeline.makespan for timeline in timelines)
    top = height
    for timeline in timelines:
        top -= title + row * timeline.plan.ranks
        place = (0.6 / width, (top + 0.22) / height, 1 - 0.75 / width, row * timeline.plan.ranks / height)
        axes = picture.add_axes(place)
        draw(timeline, axes, until=until, unit=unit if timeline is timelines[-1] else "")
    picture.legend(handles=legend(timelines), loc="lower center", ncols=4, fontsize=LABELS, frameon=False)
    return picture


def legend(timelines: Sequence[Timeline]) -> list[Patch]:
    """What the colours, tints, frames and hatches of these timelines mean: only those that occur."""
    steps = [(timeline.plan, rank, step) for timeline in timelines for rank, step in timeline.plan.steps()]
    actions = [(plan, rank, action) for plan, rank, step in steps for action in step.actions]
    kinds = {action.kind for _, _, action in actions}
    entries = [Patch(fc=COLOURS[kind], label=MEANING[kind]) for kind in COLOURS if kind in kinds]
    if any(_lap(plan, rank, action) for plan, rank, action in actions):
        entries.append(Patch(fc=_tint("#666666", 1), label="lighter: second chunk or direction"))
    if any(len(step.actions) > 1 for _, _, step in steps):
        entries.append(Patch(fc="none", ec="black", label="overlapped pair"))
    return [*entries, Patch(fc="#f4f4f4", ec="#d0d0d0", hatch="////", lw=0, label="idle")]


def _title(timeline: Timeline) -> str:
    plan, idle = timeline.plan, bubble(timeline).idle_share
    return f"{plan.name}: {plan.ranks} ranks, {plan.microbatches} microbatches, idle {idle:.1%} of rank-time"


def _digits(timeline: Timeline, axes: Axes, end: float) -> tuple[float, float]:
    """The size of the numbers in points, and the shortest bar, in time, that has room for them.

    One size for all: as large as the shortest bar allows, so that no row has numbers on some of its forwards only.
    """
    picture = axes.get_figure(root=True)
    assert picture is not None, "axes to draw on stand in a figure"
    points_per_time = axes.get_window_extent().width / end * 72 / picture.dpi
    shortest = min(span.end - span.start for row in timeline.rows for span in row)
    widest = len(str(timeline.plan.microbatches - 1)) * DIGIT_WIDTH
    size = min(max((shortest * points_per_time - 1.3) / widest, DIGITS[0]), DIGITS[1])
    return size, (size * widest + 0.4) / points_per_time


def _draw_span(axes: Axes, plan: Plan, rank: int, span: Span, size: float | None) -> None:
    """One step, with its microbatches in digits of this size, or without."""
    actions, length = span.step.actions, span.end - span.start
    height = BAR / len(actions)
    for place, action in enumerate(actions):
        low = rank - BAR / 2 + place * height
        lap = _lap(plan, rank, action)
        colour, name = _tint(COLOURS[action.kind], lap), f"{MEANING[action.kind]} {action.microbatch}"
        axes.add_patch(Rectangle((span.start, low), length, height, fc=colour, ec="white", lw=0.4, label=name))
        if size is not None:
            ink = "white" if lap == 0 and action.kind != "B" else "black"
            middle = (span.start + length / 2, low + height / 2)
            axes.text(*middle, str(action.microbatch), size=size, color=ink, ha="center", va="center_baseline")
    if len(actions) > 1:
        axes.add_patch(Rectangle((span.start, rank - BAR / 2), length, BAR, fc="none", ec="black", lw=0.7))


def _lap(plan: Plan, rank: int, action: Action) -> int:
    """Which of a rank's stages this is: 0 for the one it meets first on the way in, then 1, 2, ..."""
    return int(action.stage != rank) if plan.copies > 1 else action.stage // plan.ranks


def _tint(colour: str, lap: int) -> str:
    """The colour, halfway to white for the second stage of a rank, closer for each further one."""
    share = 0.5**lap
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))
