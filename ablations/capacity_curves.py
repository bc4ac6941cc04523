"""The page of capacity curves: quality, speed, memory and drops against the capacity, with 95% intervals.

What a study of capacity finds stands here in the frame that `reports` makes of it. Fixed capacities are lines; one that
follows past loads has no factor of its own, and is a star at what its factor was late in training. Tokens per second
are of one machine at one hour, their intervals those of unpaired processes: what a capacity changes in speed shows in
the paired ratio beside them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ablations.evidence import NoEvidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

ADAPTIVE = "adaptive"
Places = Mapping[str, float]


def curves(table: Any, *, fixed: Places, policies: Mapping[str, Places]) -> "Picture":
    """The page; `fixed` and `policies` say at which factor an arm stands."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure as Picture

    change = table[table["metric"] == "change in loss"]
    if change.empty or "routing" not in table:
        raise NoEvidence("no capacity has been trained beside dropless")
    picture = Picture(figsize=(6.4, 8.6), layout="constrained")
    quality, drops, speed, throughput, memory, legend = picture.subplots(3, 2).flat
    places = {**fixed, **_past(table)}
    _curve(quality, change, places, "least probable dropped", rcParams["text.color"])
    for colour, (words, factors) in zip(("#8c6bb1", "#e69f00"), policies.items(), strict=True):
        _curve(quality, change, factors, words, colour, line=":")
    measured = {speed: "step_cpu_ratio", throughput: "tokens_per_second", memory: "saved_bytes", drops: "drop_share"}
    for routing, colour in (("late", "#1c86c8"), ("early", "#d55e00"), ("balanced", "#009e73")):
        here = table[table["routing"] == routing]
        known = places if routing == "late" else fixed
        for axes, metric in measured.items():
            band = axes in (speed, throughput)
            _curve(axes, here[here["metric"] == metric], known, f"{routing} routing", colour, band=band)
    _chance(drops, table[table["routing"] == "late"], fixed)
    quality.axhline(0.0, color="#7f7f7f", linewidth=0.8)
    speed.axhline(1.0, color="#7f7f7f", linewidth=0.8)
    for axes, title, label in (
        (quality, "Quality", "loss - dropless', nat/token"),
        (drops, "Drops", "share of assignments"),
        (speed, "Time", "CPU time of a step / dropless'"),
        (throughput, "Speed", "tokens/s"),
        (memory, "Memory", "MB kept for backward"),
    ):
        axes.set_title(title)
        _scale(axes, label)
    _explain(legend, picture)
    return picture


def _explain(legend: "Axes", picture: "Picture") -> None:
    """Every line of the picture once, and one star for all."""
    from matplotlib.lines import Line2D

    star = Line2D([], [], linestyle="none", marker="*", color="#7f7f7f", label="follows past loads")
    drawn = [line for axes in picture.axes for line in axes.lines if not str(line.get_label()).startswith("_")]
    others = {str(line.get_label()): line for line in drawn if line.get_marker() != "*"}
    legend.set_axis_off()
    legend.legend(handles=[*others.values(), star], loc="center")


def _past(table: Any) -> dict[str, float]:
    """Where a capacity that follows past loads stands: at what its factor was late in training."""
    found = table[(table["arm"] == ADAPTIVE) & (table["metric"] == "capacity_factor") & (table["routing"] == "late")]
    return dict(zip(found["arm"], found["value"], strict=True))


def _curve(
    axes: "Axes", points: Any, places: Places, label: str, colour: str, *, line: str = "-", band: bool = False
) -> None:
    """Values with their intervals at the arms' places: a line, and a star for a capacity that is no fixed one.

    Intervals of lines that would cover each other are a band.
    """
    found = points[points["arm"].isin(list(places))]
    found = found.assign(at=found["arm"].map(dict(places))).sort_values("at")
    unit = 1e6 if "saved_bytes" in set(found["metric"]) else 1.0
    for star in (False, True):
        some = found[(found["arm"] == ADAPTIVE) == star]
        if some.empty:
            continue
        look = {"linestyle": "none", "marker": "*", "markersize": 9} if star else {"linestyle": line, "marker": "."}
        value, low, high = (some[end] / unit for end in ("value", "low", "high"))
        named_so = f"{label}, follows past loads" if star else label
        axes.plot(some["at"], value, color=colour, label=named_so, **look)
        if band and not star:
            axes.fill_between(some["at"], low, high, color=colour, alpha=0.15, linewidth=0)
            continue
        errors = [(value - low).fillna(0), (high - value).fillna(0)]
        axes.errorbar(some["at"], value, yerr=errors, fmt="none", ecolor=colour, capsize=2)


def _chance(axes: "Axes", late: Any, fixed: Places) -> None:
    """The floor of every factor, and what each would refuse of the dropless arm's routing."""
    _curve(axes, late[late["metric"] == "drop_floor"], fixed, "drops by chance (floor)", "#7f7f7f", line=":")
    asked = late[(late["arm"] == "dropless") & (late["metric"] == "refused_share")].sort_values("factor")
    axes.plot(asked["factor"], asked["value"], "--", color="#1c86c8", label="refused, were dropless limited")


def _scale(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import NullLocator

    axes.set(ylabel=label, xlabel="capacity / mean load", xscale="log")
    axes.set_xticks([1, 1.2, 1.5, 2, 3, 5], labels=["1", "1.2", "1.5", "2", "3", "5"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True)
