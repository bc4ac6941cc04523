"""The pictures of `moe_balance`: what evenness costs in loss, and loads over training as a map."""

from typing import TYPE_CHECKING, Any

from ablations.balance_methods import STRENGTHS
from ablations.evidence import NoEvidence
from ablations.load_maps import shade
from ablations.moe_balance_answer import HEADLINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

MARKERS = "osD^vPXh<>*d"


def trade(table: Any) -> "Picture":
    """Loss against evenness on held-out text, by either measure: a line per method through its strengths, from weak to
    strong, means over seeds.
    """
    from matplotlib.figure import Figure as Picture

    points = _points(table)
    if points.empty:
        raise NoEvidence("no training has both a loss and a balance")
    picture = Picture(figsize=(6.4, 7.6), layout="constrained")
    spread, busiest = picture.subplots(2, 1)
    busiest.axvline(1.0, color="#7f7f7f", linestyle=":", label="_chance")
    for axes, metric in ((spread, HEADLINE), (busiest, "excess_max_vio")):
        _paths(axes, points[points["metric"] == metric])
    spread.set(title="By squared CV", xlabel="excess squared CV in a held-out batch (0: chance)")
    busiest.set(title="By MaxVio", xlabel="excess MaxVio in a held-out batch (1: chance)")
    picture.legend(*busiest.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return picture


def _points(table: Any) -> Any:
    """A row per arm, strength and measure of evenness, with its loss, in the order of strengths."""
    ranks = {key: rank for rank, key in enumerate((arm, one) for arm, many in STRENGTHS.items() for one in many)}
    busiest = table["metric"].eq("excess_max_vio") & table["over_layers"].eq("mean")
    judged = table[table["text"].eq("held_out") & table["loads"].eq("batch") & (table["metric"].eq(HEADLINE) | busiest)]
    judged = judged[judged["steps"] == judged["steps"].max()]
    losses = table[table["metric"] == "loss"]
    points = judged.merge(losses, on=["arm", "strength", "steps", "rows"], suffixes=("", "_loss"))
    order = [ranks[key] for key in zip(points["arm"], points["strength"], strict=True)]
    return points.assign(order=order).sort_values("order")


def _paths(axes: "Axes", points: Any) -> None:
    from matplotlib.ticker import LogLocator

    for place, (arm, rows) in enumerate(points.groupby("arm", sort=False)):
        axes.plot(
            rows["value"],
            rows["value_loss"],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
            linewidth=1,
            linestyle=("-", "--")[place // 8 % 2],
            label=str(arm),
            zorder=2 + (len(rows) == 1),  # a method with one strength would hide under the lines of others
        )
    axes.set(xscale="log", ylabel="held-out loss (nat/token)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(visible=True)


def heat(table: Any) -> "Picture":
    """Load of each expert of the last layer over training, a panel a method; experts by their load at the end."""
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"] == "load_to_mean"]
    if rows.empty:
        raise NoEvidence("no loads were kept")
    rows = rows[rows["steps"] == rows["steps"].max()]
    grids = {}
    for arm, loads in rows.groupby("arm", sort=False):
        grid = loads.pivot_table(index="expert", columns="step", values="value")
        grid = grid.sort_values(grid.columns[-1])
        grids[str(arm)] = grid.columns.to_numpy(dtype=float), grid.to_numpy()
    picture = Picture(figsize=(6.4, 3.2), layout="constrained")
    panels = picture.subplots(1, len(grids), squeeze=False)[0]
    shade(picture, panels, grids)
    panels[0].set_ylabel("experts, by load at the end")
    return picture
