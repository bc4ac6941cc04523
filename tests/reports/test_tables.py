from typing import Any

from bench.record import Record
from reports.tables import failures, results


def row(arm: str, value: float | None, metric: str = "loss", seed: int = 0, **axes: str | float) -> Record:
    known: dict[str, Any] = {"study": "s", "unit": "nat/token", "noise": "absolute", "machine": "m", "revision": "r"}
    known |= {"arm": arm, "metric": metric, "seed": seed, "axes": axes, "profile": "full", "time": "t"}
    return Record(**known, value=value, n=int(value is not None), error="it broke" if value is None else None)


def test_a_point_per_arm_makes_one_table_of_arms_and_metrics() -> None:
    rows = [row(arm, value, name, steps=300) for name, value in (("loss", 2.0), ("train_loss", 3.0)) for arm in "ab"]
    (table,) = results(rows, ("loss", "train_loss"), ("a", "b"))
    assert table.caption == "By arm"
    assert table.head == ("arm", "loss (nat/token)", "train loss (nat/token)")
    assert table.rows == (("a", "2", "3"), ("b", "2", "3"))
    assert table.note == "steps 300; mean [95% interval] over 1 seed"


def test_places_go_down_the_page_by_size_and_arms_across() -> None:
    rows = [row(arm, float(n), length=n) for n in (16384, 1000, 2048) for arm in "ba"]
    (table,) = results(rows, ("loss",), ("a", "b"))
    assert table.head == ("length (tokens)", "a", "b")
    assert table.rows == (("1000", "1000", "1000"), ("2K", "2048", "2048"), ("16K", "16384", "16384"))


def test_more_arms_than_places_go_down_instead() -> None:
    rows = [row(arm, float(n), length=n) for n in (1024, 2048) for arm in "abc"]
    (table,) = results(rows, ("loss",), ("a", "b", "c"))
    assert table.head == ("arm", "length 1K", "length 2K")
    assert table.rows[0] == ("a", "1024", "2048")


def test_a_point_with_fewer_replicates_than_the_others_says_so() -> None:
    rows = [row("a", 2.0 + seed, seed=seed, length=n) for n in (1, 2, 3) for seed in range(2 if n < 3 else 1)]
    (table,) = results(rows, ("loss",), ("a",))
    assert table.note == "mean [95% interval] over 2 seeds"
    assert table.rows[2] == ("3", "2 (1 seed)")


def test_a_point_that_was_not_measured_is_a_dash() -> None:
    (table,) = results([row("a", 1.0, length=1), row("b", 2.0, length=2)], ("loss",), ("a", "b"))
    assert table.rows == (("1", "1", "-"), ("2", "-", "2"))


def test_one_cause_is_one_row_of_the_failures() -> None:
    table = failures([row(arm, None, seed=seed, length=2048) for seed in (0, 1) for arm in "ab"])
    assert table is not None
    assert table.rows == (("a, b", "length=2K", "loss", "it broke", "0 1"),)
    assert failures([row("a", 1.0)]) is None
