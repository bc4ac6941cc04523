"""A picture within a page: the page's colours, ids of its own, and few bytes that draw the same."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure as Picture

from reports.figures import render, styled
from reports.inlined import inline


def test_an_inlined_picture_has_the_colours_of_its_page_light_or_dark() -> None:
    said = (
        'fill: #ffffff"/><path style="fill: #f4f4f4; stroke: #000000"/><path style="stroke: #7f7f7f; fill: #d55e00"/>'
    )
    svg = f'<svg><path style="{said}<path style="stroke: #d1242f"/><text style="fill: #ffffff">7</text></svg>'
    text = inline(svg.encode(), "f", "c", twin=False)
    assert 'style="fill: var(--paper)"' in text
    assert "fill: color-mix(in srgb, currentColor 4%, var(--paper)); stroke: currentColor" in text
    assert "stroke: #7f7f7f; fill: #d55e00" in text, "what can be told from light and from dark stays"
    assert "stroke: var(--fails)" in text
    assert '<text style="fill: #ffffff">7</text>' in text, "white on a coloured bar stays white"


def test_lines_along_an_axis_are_said_by_one_number_in_an_inlined_picture() -> None:
    axes = (drawn := Picture(figsize=(2, 2))).add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 2), ylim=(0, 2))
    axes.plot([0, 1, 1, 2], [1, 1, 2, 0], color="#1c86c8", clip_on=False)
    axes.plot([0, 1], [0, 1], color="#d55e00", clip_on=False)
    text = inline(render(drawn, "f", {})["svg"], "f", "c", twin=False)
    # 72 points an inch, downwards, behind 0.1 inches of paper's edge
    steps, slope = re.findall(r'<path d="([^"]*)" style="fill: none', text)
    start, across, up, down = re.fullmatch(r"M(\S+ \S+)H(\S+)V(\S+)L(\S+ \S+)", steps).groups()  # type: ignore[union-attr]
    (x, y), (right, low) = (map(float, pair.split()) for pair in (start, down))
    assert (float(across) - x, y - float(up)) == pytest.approx((72, 72), abs=0.02)
    assert (right - x, low - y) == pytest.approx((144, 72), abs=0.02)
    assert re.fullmatch(r"M\S+ \S+L\S+ \S+", slope)


def test_neighbouring_cells_of_one_colour_are_one_in_an_inlined_map() -> None:
    axes = (drawn := Picture(figsize=(2, 2))).add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    values = np.array([[1.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    axes.pcolormesh(values, cmap="viridis", clip_on=False)
    text = inline(render(drawn, "f", {})["svg"], "f", "c", twin=False)
    cells = re.findall(r'<path d="M(\S+) (\S+)H(\S+)V(\S+)H\1Z" style="fill: (#\w+)"/>', text)
    lefts, lows, rights, highs, fills = zip(*cells, strict=True)
    assert [fills.count(fill) for fill in dict.fromkeys(fills)] == [2, 1, 1]
    widths = [float(right) - float(left) for left, right in zip(lefts, rights, strict=True)]
    assert np.array(widths) / widths[1] == pytest.approx(np.array([2, 1, 1, 4]), rel=0.01)
    assert len(set(zip(lows, highs, strict=True))) == 2, "rows stay apart"


@pytest.mark.parametrize("name", ["a", "b-c"])
def test_an_inlined_picture_has_ids_of_its_own_and_no_outside_name(name: str) -> None:
    with styled():
        axes = (drawn := Picture()).subplots()
        axes.plot([1, 2], [1, 1], marker="o")
        files = render(drawn, name, {"records": 2})
    text = inline(files["svg"], name, 'what "it" shows', twin=True)
    assert text.startswith('<svg role="img" aria-label="what &quot;it&quot; shows"')
    assert f'aria-describedby="{name}-caption" aria-details="{name}-table"' in text
    assert "http" not in text
    assert text.count('id="') == text.count(f'id="{name}-')
    assert "currentColor" in text
