"""Loads of experts over steps as a map: a panel per arm, a row per expert, its load over the mean as a colour.

One bar says which; what is beyond 8 times the mean, or an eighth of it, looks like these.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture


def shade(picture: "Picture", panels: Sequence["Axes"], grids: Mapping[str, tuple["np.ndarray", "np.ndarray"]]) -> None:
    """Fill a panel for each arm from its steps and the ratios, [experts, steps], the first expert at the bottom."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    colours = colormaps["PuOr_r"].resampled(25)  # few enough for a bar that is drawn, not an image
    colours = colours.with_extremes(bad=colours(0.0))  # a load of none has no logarithm
    for axes, (arm, (steps, ratios)) in zip(panels, grids.items(), strict=True):
        seen = axes.pcolormesh(
            steps,
            np.arange(len(ratios)),
            ratios,
            cmap=colours,
            norm=LogNorm(1 / 8, 8),
            shading="nearest",
            clip_on=False,  # which a picture would say again at each of its thousand cells
            label="load / mean load",
        )
        axes.set(title=arm, xlabel="step")
        axes.set_yticks([])
    bar = picture.colorbar(
        seen, ax=list(panels), label="load / mean load", ticks=[2.0**power for power in range(-3, 4)]
    )
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    bar.ax.minorticks_off()
