"""The picture shows every action where the timeline has it, in colours that can be told apart."""

import subprocess
import sys
from io import BytesIO
from itertools import combinations, product

import numpy as np
import pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.patches import Rectangle

from dsv3.pipeline import Plan, Times, dual_pipe, interleaved_one_f_one_b, one_f_one_b, simulate, zero_bubble_h1
from dsv3.pipeline.draw import COLOURS, _tint, figure

PLANS = [one_f_one_b(4, 8), interleaved_one_f_one_b(4, 8), zero_bubble_h1(4, 8), dual_pipe(4, 8), dual_pipe(8, 20)]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.name}-{plan.ranks}x{plan.microbatches}")
def test_every_action_is_a_bar_where_it_ran_with_its_microbatch(plan: Plan) -> None:
    timeline = simulate(plan, Times())
    axes = figure([timeline]).axes[0]
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    bars = [bar for bar in frames if to_rgba(bar.get_facecolor())[3] == 1 and not bar.get_hatch()]
    drawn = sorted((bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in bars)
    wanted = sorted(
        (span.start, span.end - span.start, rank)
        for rank, row in enumerate(timeline.rows)
        for span in row
        for _ in span.step.actions
    )
    assert drawn == wanted  # halves and whole numbers are exact in binary
    numbers = sorted(int(text.get_text()) for text in axes.texts)
    assert numbers == sorted(action.microbatch for _, step in plan.steps() for action in step.actions)
    assert axes.get_xlabel() == "time (forwards)"
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"rank {rank}" for rank in range(plan.ranks)]


def test_numbers_that_would_not_fit_are_left_out() -> None:
    assert not figure([simulate(one_f_one_b(2, 100), Times())]).axes[0].texts


def test_timelines_share_one_time_axis_and_a_legend_of_what_occurs() -> None:
    picture = figure([simulate(plan, Times()) for plan in PLANS[:3]], unit="ms")
    assert {axes.get_xlim() for axes in picture.axes} == {(0.0, 33.0)}
    assert [axes.get_xlabel() for axes in picture.axes] == ["", "", "time (ms)"]
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    meant = ["forward", "input gradient", "weight gradient", "backward (both)", "lighter: second chunk or direction"]
    assert labels == [*meant, "idle"]


def test_the_same_timeline_gives_the_same_bytes() -> None:
    def png() -> bytes:
        out = BytesIO()
        figure([simulate(dual_pipe(4, 8), Times())]).savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()

    assert png() == png()


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, deficiency: str) -> np.ndarray:
    """CIE L*a*b* of a colour as someone with this deficiency sees it."""
    encoded = np.array(to_rgb(colour))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(np.maximum(xyz / np.array([0.9505, 1.0, 1.089]), 0.008856))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_any_two_colours_are_told_apart_with_any_common_deficiency(deficiency: str) -> None:
    shades = [_tint(colour, lap) for colour, lap in product(COLOURS.values(), (0, 1))]
    nearest = min(np.linalg.norm(lab(a, deficiency) - lab(b, deficiency)) for a, b in combinations(shades, 2))
    # About 2.3 is the least difference that people notice between two patches side by side.
    assert nearest > 3 * 2.3


def test_drawing_needs_no_torch_and_no_window() -> None:
    code = "import sys, dsv3.pipeline.draw; print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
