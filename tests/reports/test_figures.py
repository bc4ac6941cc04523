from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture

from ablations.evidence import NoEvidence
from ablations.study import Figure, Study
from bench.record import Record
from reports.figures import draw, render


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
