import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Picture

from ablations.evidence import NoEvidence
from ablations.study import Figure, Study
from bench.record import Record
from reports.figures import draw, inline, render


def row(arm: str, value: float, metric: str = "loss", seed: int = 0, **axes: str | float) -> Record:
    known: dict[str, Any] = {"study": "s", "unit": "", "noise": "absolute", "machine": "m", "revision": "r", "n": 1}
    return Record(**known, arm=arm, metric=metric, seed=seed, value=value, axes=axes, profile="full", time="t")


def labels(picture: Picture, axis: str) -> list[str]:
    picture.canvas.draw()
    axes = picture.axes[0]
    return [label.get_text() for label in (axes.get_xticklabels() if axis == "x" else axes.get_yticklabels())]


def picture(study: Study, figure: Figure, rows: list[Record]) -> Picture:
    return draw(study, figure, rows)[0]


def texts(picture: Picture) -> str:
    return render(picture, "name", {})["svg"].decode()


def test_arms_at_one_place_stand_a_little_apart_around_it(coin: Study) -> None:
    rows = [row(arm, 1.0, tosses=n) for arm in ("fair", "bent") for n in (0, 100)]
    axes = picture(coin, Figure("f", "c", metric="loss", x="tosses"), rows).axes[0]
    drawn = [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    assert [-0.5, 99.5] in drawn
    assert [0.5, 100.5] in drawn


def test_an_axis_of_words_is_drawn_in_their_words(coin: Study) -> None:
    rows = [row("fair", 1.0, when=when) for when in ("early", "late")]
    assert labels(picture(coin, Figure("f", "c", metric="loss", x="when"), rows), "x") == ["early", "late"]


def test_bytes_are_ticked_in_powers_of_two_and_shares_in_percent(coin: Study) -> None:
    rows = [row("fair", 2.0**n, "peak_bytes", length=2**n) for n in range(20, 25)]
    shown = labels(picture(coin, Figure("f", "c", metric="peak_bytes", x="length", log="xy"), rows), "y")
    assert {"1 MiB", "4 MiB", "16 MiB"} <= set(shown)
    rows = [row("fair", share, "drop_share", length=share) for share in (0.1, 0.2)]
    assert "10%" in labels(picture(coin, Figure("f", "c", metric="drop_share", x="length"), rows), "y")


def test_an_interval_of_bytes_on_a_logarithmic_axis_has_byte_ticks_too(coin: Study) -> None:
    rows = [row(arm, value, "kv_bytes_per_token") for arm, value in (("fair", 2.0**15), ("bent", 2.0**22))]
    drawn = picture(coin, Figure("f", "c", metric="kv_bytes_per_token", kind="interval", log="x"), rows)
    assert {"32 KiB", "1 MiB"} <= set(labels(drawn, "x"))


def test_an_axis_says_its_unit_where_its_name_does_not(coin: Study) -> None:
    rows = [row("fair", 1.0, length=n) for n in (1, 2)]
    assert picture(coin, Figure("f", "c", metric="loss", x="length"), rows).axes[0].get_xlabel() == "length (tokens)"


def test_labels_that_would_touch_are_left_out(coin: Study) -> None:
    rows = [row("fair", 1.0, tosses=n) for n in (1, 100, 101, 200)]
    assert labels(picture(coin, Figure("f", "c", metric="loss", x="tosses"), rows), "x") == ["1", "100", "", "200"]


def test_a_wild_interval_does_not_dwarf_the_points(coin: Study) -> None:
    rows = [row("fair", value, seed=seed, tosses=n) for n in (1, 2) for seed, value in enumerate((1.0, 1.0 + n * 100))]
    low, high = picture(coin, Figure("f", "c", metric="loss", x="tosses"), rows).axes[0].get_ylim()
    assert high - low <= 3 * 50


def test_a_reference_is_always_in_view(coin: Study) -> None:
    rows = [row("fair", 1.0, tosses=n) for n in (1, 2)]
    figure = Figure("f", "c", metric="loss", x="tosses", reference=(9.0, "claimed"))
    axes = picture(coin, figure, rows).axes[0]
    assert axes.get_ylim()[0] <= 9.0 <= axes.get_ylim()[1]
    assert "claimed" in texts(picture(coin, replace(figure, kind="interval", where={"tosses": 1}), rows))


def test_a_figure_that_draws_itself_is_pending_without_its_records(coin: Study) -> None:
    def own(table: Any) -> Picture:
        raise NoEvidence("no record of wear")

    assert "pending: no record of wear" in texts(picture(coin, Figure("f", "c", draw=own), []))
    by_phase = Figure("f", "c", draw=lambda table: table["phase"])
    assert "pending: no record with phase yet" in texts(picture(coin, by_phase, []))


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
def test_an_inlined_picture_has_ids_of_its_own_and_no_outside_name(coin: Study, name: str) -> None:
    rows = [row("fair", 1.0, tosses=n) for n in (1, 2)]
    files = render(picture(coin, Figure("f", "c", metric="loss", x="tosses"), rows), name, {"records": 2})
    text = inline(files["svg"], name, 'what "it" shows', twin=True)
    assert text.startswith('<svg role="img" aria-label="what &quot;it&quot; shows"')
    assert f'aria-describedby="{name}-caption" aria-details="{name}-table"' in text
    assert "http" not in text
    assert text.count('id="') == text.count(f'id="{name}-')
    assert "currentColor" in text
