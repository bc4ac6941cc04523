"""The pictures of `moe_balance`: what evenness costs in loss, and loads over training as a map."""

from typing import TYPE_CHECKING, Any

from ablations.evidence import NoEvidence
from ablations.load_maps import shade

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

MARKERS = "osD^vPXh<>*d"


def trade(table: Any) -> "Picture":
    """Loss against excess MaxVio on held-out text: a line per method through its strengths, means over seeds."""
    from matplotlib.figure import Figure as Picture

    judged = table[(table["text"] == "held_out") & (table["loads"] == "batch") & (table["over_layers"] == "mean")]
    judged = judged[judged["steps"] == judged["steps"].max()]
    losses = table[table["metric"] == "loss"]
    points = judged.merge(losses, on=["arm", "strength", "steps", "rows"], suffixes=("", "_loss"))
    if points.empty:
        raise NoEvidence("no training has both a loss and a balance")
    picture = Picture(figsize=(6.4, 4.6), layout="constrained")
    axes = picture.subplots()
    for place, (arm, rows) in enumerate(points.groupby("arm", sort=False)):
        rows = rows.sort_values("value")
        axes.plot(
            rows["value"],
            rows["value_loss"],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
            linewidth=1,
            linestyle=("-", "--")[place // 8 % 2],
            label=str(arm),
        )
    axes.axvline(1.0, color="#7f7f7f", linestyle=":", label="_chance")
    axes.set(xscale="log", xlabel="excess MaxVio on held-out text (1: chance)", ylabel="held-out loss (nat/token)")
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20) if tick <= 1.1 * points["value"].max()]
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True)
    picture.legend(loc="outside lower center", ncols=4)
    return picture


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
