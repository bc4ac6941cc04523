"""Each figure has a table of exactly what it shows, and says what it was made of."""

from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D

from ablations.study import Figure, Study
from bench.record import Record
from dsv3.pipeline import Times, named, simulate
from dsv3.pipeline.draw import figure as timelines
from reports.figures import draw, provenance, provenance_in, render
from reports.twins import exact, of_picture


def row(arm: str, value: float, seed: int = 0, **axes: str | float) -> Record:
    known: dict[str, Any] = {"study": "s", "unit": "", "noise": "absolute", "machine": "m", "revision": "r", "n": 1}
    return Record(**known, arm=arm, metric="loss", seed=seed, value=value, axes=axes, profile="full", time="t")


ROWS = [
    row(arm, at * n + seed, seed, tosses=n)
    for at, arm in enumerate(("fair", "bent"))
    for n in (1, 9)
    for seed in (0, 1)
]


def test_a_lines_table_has_the_points_that_are_drawn(coin: Study) -> None:
    picture, (table,) = draw(coin, Figure("f", "c", metric="loss", x="tosses"), ROWS)
    assert table.head == ("tosses", "fair", "bent")
    drawn = [part for bar in picture.axes[0].containers for part in bar.get_children() if isinstance(part, Line2D)]
    lines = [line for line in drawn if line.get_linestyle() != "None"]
    assert len(lines) == 2
    for column, line in enumerate(lines, start=1):
        told = [float(cells[column].split(" ")[0]) for cells in table.rows]
        assert told == np.asarray(line.get_ydata()).tolist()


def test_an_interval_table_has_the_ends_that_are_drawn(coin: Study) -> None:
    picture, (table,) = draw(coin, Figure("f", "c", metric="loss", kind="interval", where={"tosses": 9}), ROWS)
    drawn = [part for bar in picture.axes[0].containers for part in bar.get_children()]
    ends = [part.get_segments()[0][:, 0].tolist() for part in drawn if isinstance(part, LineCollection)]
    told = [[float(cell) for cell in cells[-2:]] for cells in table.rows]
    assert told == [pytest.approx(pair, rel=1e-5) for pair in ends]
    assert [cells[0] for cells in table.rows] == ["fair", "bent"]


def test_a_map_is_read_back_cell_by_cell_from_the_top() -> None:
    axes = (picture := Picture()).subplots()
    axes.pcolormesh([0.0, 10.0, 20.0], [0, 1], np.array([[1.0, 2.0, 3.0], [4.0, 5.5, 6.0]]), label="load")
    axes.set(xlabel="step", title="arm")
    axes.pcolormesh([0.0, 1.0], [0, 1], np.zeros((2, 2)))
    (table,) = of_picture(picture, "Caption")
    assert (table.caption, table.note) == ("arm", "load")
    assert table.head == ("row", "step 0", "step 10", "step 20")
    assert table.rows == (("2", "4", "5.5", "6"), ("1", "1", "2", "3"))


def test_a_picture_that_drew_itself_is_read_back_whole() -> None:
    picture = Picture()
    axes = picture.subplots()
    axes.plot([1, 2], [0.5, 1 / 3], label="model")
    axes.plot([2, 4], [5, 6], label="longer")
    axes.axhline(2.0, label="bigram")
    axes.plot([0, 1], [0, 1])
    axes.set(xlabel="step", ylabel="bits")
    (table,) = of_picture(picture, "Caption")
    assert (table.caption, table.note) == ("Caption", "bits, levels: bigram 2")
    assert table.head == ("step", "model", "longer")
    assert table.rows == (("1", "0.5", "-"), ("2", "0.333333", "5"), ("4", "-", "6"))


def test_marks_beside_named_rows_are_read_back_row_by_row() -> None:
    picture = Picture()
    left, right = picture.subplots(1, 2, sharey=True)
    for axes in (left, right):
        axes.plot([1.5, 1.5], [-0.2, 0.8], "o", label="placed")
        axes.plot([4.0], [1.2], "s", label="in order")
        axes.axvline(1.0)
        axes.set(xlabel="busiest rank")
    left.set_yticks(range(2), ["zipf", "even"])
    for table in of_picture(picture, "Caption"):
        assert (table.caption, table.note) == ("Caption", "busiest rank")
        assert table.head == ("row", "placed", "in order")
        assert table.rows == (("zipf", "1.5", "-"), ("even", "1.5", "4"))


def test_the_bars_of_a_timeline_are_told_rank_by_rank() -> None:
    timeline = simulate(named("one_f_one_b").plan(2, 3), Times(f=1, b=1, w=1))
    (table,) = of_picture(timelines([timeline]), "c")
    assert [name for name, _ in table.rows] == ["rank 0", "rank 1"]
    bars = table.rows[1][1].split(", ")
    assert bars[0] == "forward 0 (1 to 2)"
    assert len(bars) == sum(len(span.step.actions) for span in timeline.rows[1])


def test_a_figure_that_is_pending_has_no_table(coin: Study) -> None:
    assert draw(coin, Figure("f", "c", metric="flops", x="tosses"), ROWS)[1] == []


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_what_a_picture_was_made_of_is_read_back_from_its_file(coin: Study, kind: str) -> None:
    said = provenance("study", "f \"<&>' é", ROWS)
    files = render(draw(coin, Figure("f", "c", metric="loss", x="tosses"), ROWS)[0], "f", said)
    assert provenance_in(files[kind]) == said


def test_another_value_is_another_digest() -> None:
    other = [*ROWS[:-1], row("bent", 99.0, 1, tosses=9)]
    assert provenance("s", "f", ROWS)["digest"] != provenance("s", "f", other)["digest"]


@pytest.mark.parametrize("data", [b"<svg></svg>", b"\x89PNG\r\n\x1a\n"])
def test_a_file_without_provenance_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="must be the JSON"):
        provenance_in(data)


@pytest.mark.parametrize("value, text", [(3.0, "3"), (1 / 3, "0.333333"), (12345678.9, "12345679"), (1e-9, "1e-09")])
def test_six_figures_are_shown(value: float, text: str) -> None:
    assert exact(value) == text
