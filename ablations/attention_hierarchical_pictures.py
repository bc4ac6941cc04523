"""Pictures of attention down a tree: what choosing takes, and how time grows with length."""

from typing import TYPE_CHECKING, Any

from ablations.evidence import NoEvidence
from bench.attention_sizes import BLOCK, BLOCK_ARMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

BASELINE = "sdpa"
MILLION = 2**20


def scores(table: Any) -> "Picture":
    """Scores per token against length on logarithmic scales: a flat search's grow as n, a tree's as log n, those of a
    search by bounds depend on the inputs, which are random here.
    """
    rows = table[table["metric"] == "selection_scores"]
    if rows.empty:
        raise NoEvidence("no record of selection_scores yet")
    each = rows["value"] / rows["length"]
    return by_choice(rows, each, title="What choosing takes", label="scores per token, one head")


def by_choice(rows: Any, values: Any, *, title: str, label: str) -> "Picture":
    """Values of rows against length, of each way to choose: for blocks of queries and for single ones."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(6.4, 3.4), layout="constrained")
    axes = picture.subplots()
    for size in (1, BLOCK):
        for arm, colour in (("blocks", "#d55e00"), ("hierarchical", "#009e73"), ("best_first", "#0072b2")):
            line = rows[(rows["arm"] == arm) & (rows["queries per choice"] == size)].sort_values("length")
            if line.empty:
                continue
            name = f"{arm}, {'each token' if size == 1 else f'{size} tokens'} a choice"
            style = "-" if size == 1 else "--"
            axes.plot(line["length"], values[line.index], style, marker="o", color=colour, label=name)
    ticks = sorted({int(length) for length in rows["length"]})
    axes.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
    axes.set_title(title)
    axes.set_xticks(ticks, [f"{tick // 1024}K" if tick < MILLION else "1M" for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, which="major")
    picture.legend(loc="outside right center")
    return picture


def growth(table: Any) -> "Picture":
    """Forward seconds in fp32 against length, each line with its slope, and where n log n would lead from 4K."""
    import numpy as np
    from matplotlib import rcParams
    from matplotlib.figure import Figure as Picture

    rows = table[(table["metric"] == "cpu_seconds") & (table["phase"] == "forward") & (table["part"] == "time")]
    rows = rows[(rows["dtype"] == "fp32") & (rows["arm"] != "flex")]
    if rows["length"].nunique() < 2:
        raise NoEvidence("a slope needs forward cpu_seconds at two lengths: the full profile has them")
    picture = Picture(figsize=(6.4, 3.4), layout="constrained")
    axes = picture.subplots()
    for arm in BLOCK_ARMS:
        line = rows[rows["arm"] == arm].sort_values("length")
        if len(line) > 1:
            slope = np.polyfit(np.log(line["length"].astype(float)), np.log(line["value"]), 1)[0]
            ink = {"color": rcParams["text.color"], "linestyle": "--"} if arm == BASELINE else {}
            axes.plot(line["length"], line["value"], marker="o", label=f"{arm}: n^{slope:.2f}", **ink)
            if arm == "hierarchical":
                n = line["length"].astype(float)
                ideal = line["value"].iloc[0] * (n * np.log(n)) / (n.iloc[0] * np.log(n.iloc[0]))
                axes.plot(n, ideal, ":", color="#7f7f7f", label="n log n")
    ticks = sorted({int(length) for length in rows["length"]})
    axes.set(xscale="log", yscale="log", xlabel="length", ylabel="seconds of CPU time, one thread")
    axes.set_title("How forward time grows with length, fp32")
    axes.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, which="major")
    picture.legend(loc="outside right center", title="slope of the line")
    return picture
