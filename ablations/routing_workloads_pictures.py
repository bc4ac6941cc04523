"""The pictures of `routing_workloads`: every load of few experts as a map, and the busiest rank by way of placing."""

from typing import TYPE_CHECKING, Any

from ablations.evidence import NoEvidence
from ablations.load_maps import shade

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

WINDOW = 8  # steps whose loads say in which order experts stand
COLUMNS = 4
PLACINGS = {
    "in_order": ("in order", "s", "#7f7f7f"),
    "placed": ("placed by past loads", "o", "#1c86c8"),
    "foreseen": ("placed knowing the step", "D", "#d55e00"),
}


def maps(table: Any) -> "Picture":
    """Loads over steps, a panel a workload; experts by their load in the first WINDOW steps, equals in their order."""
    import numpy as np
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"] == "load_to_mean"]
    if rows.empty:
        raise NoEvidence("no loads were kept")
    grids = {}
    for arm, loads in rows.groupby("arm", sort=False):
        ratios = np.array(loads.sort_values("expert")["samples"].tolist())
        order = ratios[:, :WINDOW].sum(axis=1).argsort(kind="stable")
        grids[str(arm)] = np.arange(ratios.shape[1]), ratios[order].round(2)
    picture = Picture(figsize=(6.4, 3.8), layout="constrained")
    panels = picture.subplots(-(-len(grids) // COLUMNS), COLUMNS, squeeze=False)
    every = [axes for row in panels for axes in row]
    shade(picture, every[: len(grids)], grids)
    for axes in every[len(grids) :]:
        axes.remove()
    for axes, arm in zip(every, grids, strict=False):
        axes.set_title(arm, fontsize=8)  # as long as the panel is wide
    picture.supylabel("experts, by load in the first steps", fontsize=9)
    return picture


def busiest(table: Any) -> "Picture":
    """The busiest rank's load over the mean at the largest size: a row a workload, a mark a way of placing, a panel
    without and one with redundant experts; what is in order has none.
    """
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"] == "busiest_rank_load"]
    if rows.empty:
        raise NoEvidence("no expert has been placed")
    rows = rows[rows["experts"] == rows["experts"].max()]
    arms = list(dict.fromkeys(rows["arm"]))
    picture = Picture(figsize=(6.4, 3.6), layout="constrained")
    panels = picture.subplots(1, 2, sharex=True, sharey=True)
    for axes, redundant in zip(panels, sorted(set(rows["redundant"])), strict=True):
        _marks(axes, rows[(rows["redundant"] == redundant) | (rows["placing"] == "in_order")], arms)
        axes.set_title(f"{redundant:.0f} redundant experts" if redundant else "no redundant experts")
        axes.set_xlabel("busiest rank / mean rank (1: even)")
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    picture.legend(handles=panels[0].get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
    return picture


def _marks(axes: "Axes", rows: Any, arms: list[str]) -> None:
    places = {arm: place for place, arm in enumerate(arms)}
    for aside, (placing, (label, marker, colour)) in enumerate(PLACINGS.items(), start=-1):
        points = rows[rows["placing"] == placing]
        at = points["arm"].map(places) + 0.2 * aside
        errors = [(points["value"] - points["low"]).fillna(0), (points["high"] - points["value"]).fillna(0)]
        axes.errorbar(points["value"], at, xerr=errors, fmt="none", ecolor=colour, capsize=2)
        axes.plot(points["value"], at, marker, color=colour, markersize=4, label=label)
    axes.axvline(1.0, color="#7f7f7f", linewidth=0.8)
    axes.grid(visible=True, axis="x")
