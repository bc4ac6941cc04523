"""The pictures of `moe_balance`: what evenness costs in loss, and loads over training as a map."""

from typing import TYPE_CHECKING, Any

from ablations.evidence import NoEvidence

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
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"] == "load_to_mean"]
    if rows.empty:
        raise NoEvidence("no loads were kept")
    rows = rows[rows["steps"] == rows["steps"].max()]
    arms = list(dict.fromkeys(rows["arm"]))
    picture = Picture(figsize=(6.4, 3.2), layout="constrained")
    panels = picture.subplots(1, len(arms), squeeze=False)[0]
    colours = colormaps["PuOr_r"].resampled(25)  # few enough for a bar that is drawn, not an image
    colours = colours.with_extremes(bad=colours(0.0))  # a load of none has no logarithm
    for axes, arm in zip(panels, arms, strict=True):
        grid = rows[rows["arm"] == arm].pivot_table(index="expert", columns="step", values="value")
        grid = grid.sort_values(grid.columns[-1])
        seen = axes.pcolormesh(
            grid.columns.to_numpy(dtype=float),
            np.arange(len(grid)),
            grid.to_numpy(),
            cmap=colours,
            norm=LogNorm(1 / 8, 8),
            shading="nearest",
            label="load / mean load",
        )
        axes.set(title=arm, xlabel="step")
        axes.set_yticks([])
    panels[0].set_ylabel("experts, by load at the end")
    bar = picture.colorbar(
        seen, ax=list(panels), label="load / mean load", ticks=[2.0**power for power in range(-3, 4)]
    )
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    bar.ax.minorticks_off()
    return picture
