"""The pictures of `moe_recovery`: excess MaxVio after the collapse, update by update, and updates until recovery."""

from typing import TYPE_CHECKING, Any

from ablations.balance_methods import ASKED, TRIED
from ablations.evidence import NoEvidence
from bench.metrics import RECOVERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

GREY = "#7f7f7f"
PANELS = {
    "A bias by the sign of the error": ("deepseek_v3", "sign_bias", "centred_sign_bias"),
    "A bias by its size, or at a quantile": ("quantile_exact", "quantile", "proportional"),
    "A loss on loads": ("global_batch", "switch", "sequence"),
    "Nothing, or what sees no loads": ("none", "quadratic", "similarity", "z_loss", "expert_choice"),
}
TICKS = (0, 1, 2, 5, 10, 20, 50, 100)


def curves(table: Any) -> "Picture":
    """Excess MaxVio against updates, a panel a family: solid at the default strength, dashed at the other."""
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"] == "excess_max_vio"]
    rows = rows[rows["updates"].notna() & (rows["watched"] == rows["watched"].max())]
    if rows.empty:
        raise NoEvidence("no training has gone on from a collapse")
    picture = Picture(figsize=(7.2, 7.6), layout="constrained")
    panels = picture.subplots(2, 2)
    for axes, (title, arms) in zip(panels.flat, PANELS.items(), strict=True):
        for place, arm in enumerate(arms):
            for strength in TRIED[arm]:
                _curve(axes, rows[(rows["arm"] == arm) & (rows["strength"] == strength)], place)
        _frame(axes, title)
    return picture


def steps(table: Any) -> "Picture":
    """Updates until recovery, a bar a method and strength, the fastest first. Where not all trainings recover the bar
    is hatched, reaches to the last look and says how many do.
    """
    from matplotlib.figure import Figure as Picture

    rows = table[table["metric"].isin(["recovered_share", "recovery_steps"])]
    if rows.empty:
        raise NoEvidence("no training has gone on from a collapse")
    most = int(rows["watched"].max())
    rows = rows[rows["watched"] == most]
    of = {(row["metric"], row["arm"], row["strength"]): row for _, row in rows.iterrows()}
    shares = {key[1:]: row["value"] for key, row in of.items() if key[0] == "recovered_share"}
    after = {key: of["recovery_steps", *key] for key in shares if shares[key] == 1.0}
    order = sorted(shares, key=lambda key: after[key]["value"] if key in after else 2 * most - shares[key])
    picture = Picture(figsize=(6.4, 0.9 + 0.24 * len(order)), layout="constrained")
    axes = picture.subplots()
    for at, key in enumerate(order):
        _bar(axes, at, shares[key], after.get(key), most)
    axes.axvline(ASKED, color=GREY, linestyle="--")
    axes.set(xlim=(0, 1.5 * most), xlabel=f"updates until a batch is at {RECOVERED:g} times chance (line: {ASKED})")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= most])
    axes.set_yticks(range(len(order)), [arm if at == "default" else f"{arm}, {at}" for arm, at in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    return picture


def _bar(axes: "Axes", at: int, share: float, after: Any, most: int) -> None:
    if after is None:
        said = f"not within {most}" if share == 0.0 else f"{share:.0%} within {most}"
        axes.barh(at, most, color="none", edgecolor=GREY, hatch="///", height=0.7, label=[said])
    else:
        value, low, high = after["value"], after["low"], after["high"]
        known = low < high  # a single training has no interval
        said = f"{value:.3g} [{low:.3g}, {high:.3g}]" if known else f"{value:.3g}"
        errors = [[value - low], [min(high, most) - value]] if known else None
        axes.barh(at, value, xerr=errors, color="C0", height=0.7, capsize=3, label=["all recovered"])
    axes.annotate(said, (1.02 * most, at), va="center", fontsize=8)


def _frame(axes: "Axes", title: str) -> None:
    """The scales, the border of recovery, chance, and by when it is asked."""
    for level, line in ((RECOVERED, "--"), (1.0, ":")):
        axes.axhline(level, color=GREY, linestyle=line, linewidth=0.9)
    axes.axvline(ASKED, color=GREY, linestyle="--", linewidth=0.9)
    axes.set(title=title, xlabel="updates since the collapse", ylabel="excess MaxVio (1: chance)")
    axes.set(yscale="log", ylim=(0.9, 70))
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
    axes.set_xlim(0, TICKS[-1])
    axes.set_xticks(TICKS, labels=list(map(str, TICKS)))
    axes.set_yticks([1, 1.5, 3, 10, 30], labels=["1", "1.5", "3", "10", "30"])
    axes.minorticks_off()
    axes.grid(visible=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5, ncols=2, handlelength=2.6, loc="upper left", bbox_to_anchor=(-0.15, -0.2))


def _curve(axes: "Axes", rows: Any, place: int) -> None:
    from matplotlib import rcParams

    if rows.empty:
        return
    rows = rows.sort_values("updates")
    colour = rcParams["axes.prop_cycle"].by_key()["color"][place]
    arm, strength = rows["arm"].iloc[0], rows["strength"].iloc[0]
    line = "-" if strength == "default" else "--"
    label = arm if strength == "default" else f"{arm}, {strength}"
    width = max(0.9, 2.8 - 0.8 * place)  # a line on another is narrower
    axes.plot(rows["updates"], rows["value"], color=colour, linestyle=line, linewidth=width, label=label)
    known = rows[rows["low"].notna()]
    axes.fill_between(known["updates"], known["low"].clip(lower=0.9), known["high"], color=colour, alpha=0.15, lw=0)
