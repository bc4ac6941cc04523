"""What tuning chose is read from the grid in the records, and an optimum at the edge of it is counted."""

from typing import Any

from ablations.traced import Prose
from bench.record import Record
from reports.tuned import chosen

LOSSES = {0: {0.001: 3.0, 0.003: 2.0, 0.01: 2.5}, 1: {0.001: 3.0, 0.003: 2.5, 0.01: 2.0}}


def row(value: float | None, seed: int, arm: str = "a", metric: str = "bits_per_byte", **axes: Any) -> Record:
    known: dict[str, Any] = {
        "study": "s",
        "unit": "",
        "noise": "absolute",
        "machine": "m",
        "revision": "r",
        "time": "t",
    }
    error = None if value is not None else "pending: diverged"
    return Record(**known, arm=arm, metric=metric, seed=seed, value=value, n=1, profile="full", axes=axes, error=error)


def grid(arm: str, losses: dict[float, float | None], seed: int) -> list[Record]:
    rows = [row(loss, seed, arm, text="validation", steps=9, lr=lr) for lr, loss in losses.items()]
    spent = row(1e9, seed, arm, "flops", text="validation", steps=9)
    return [*rows, spent, row(2.2, seed, arm, text="test", steps=9)]


def test_the_value_of_the_lowest_loss_is_counted_over_seeds() -> None:
    records = [found for seed, losses in LOSSES.items() for found in grid("a", dict(losses), seed)]
    (table,) = chosen(records)
    assert table.caption == "What each arm's tuning chose: lr"
    assert table.note.startswith("of 0.001, 0.003, 0.01: that with the lowest bits per byte")
    assert table.rows == (("a", "0.003 (1), 0.01 (1)", "1 of 2"),)
    (cell,) = table.rows[0][2:]
    assert isinstance(cell, Prose)
    assert cell.references[0].sources == {found.id for found in records if "lr" in found.axes}


def test_a_value_that_diverged_is_part_of_the_grid() -> None:
    (table,) = chosen(grid("a", {0.001: 3.0, 0.003: 2.0, 0.01: None}, 0))
    assert table.rows == (("a", "0.003 (1)", "0 of 1"),)


def test_values_that_are_words_have_no_edge() -> None:
    rows = [row(loss, 0, text="validation", kind=kind) for kind, loss in (("cosine", 1.0), ("linear", 2.0))]
    (table,) = chosen([*rows, row(1.0, 0, text="test")])
    assert table.rows == (("a", "cosine (1)", "-"),)


def test_a_study_that_tunes_nothing_has_no_such_table() -> None:
    assert chosen([row(1.0, 0, text="test"), row(1.0, 0, text="validation")]) == []
    assert chosen([row(1.0, 0, length=3)]) == []
