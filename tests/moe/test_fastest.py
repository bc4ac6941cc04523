"""The table of fastest dispatches: what is read from it, and what becomes of numbers of rows between its entries."""

from typing import get_args

import pytest
import torch

from dsv3.moe.fastest import Name, entries, fastest, in_words, table


@pytest.mark.parametrize("row", table(), ids=lambda row: "-".join(map(str, list(row.values())[:4])))
def test_an_entry_holds_from_its_rows_to_the_next(row: dict[str, object]) -> None:
    kind = row["instructions"], getattr(torch, str(row["dtype"])), row["direction"]
    rows = int(str(row["rows"]))
    assert fastest(*kind, rows) == row["fastest"]
    assert row["fastest"] in get_args(Name)
    alike = [other for other in table() if (other["instructions"], other["dtype"], other["direction"]) == _key(row)]
    later = sorted(other["rows"] for other in alike if other["rows"] > rows)
    assert fastest(*kind, later[0] - 0.1 if later else 1e9) == row["fastest"]
    if rows == min(other["rows"] for other in alike):
        assert fastest(*kind, 0) == row["fastest"]


def _key(row: dict[str, object]) -> tuple[object, object, object]:
    return row["instructions"], row["dtype"], row["direction"]


def test_what_is_not_in_the_table_is_looped() -> None:
    assert fastest("none", torch.float64, "training", 8) == "looped"
    assert fastest("sve", torch.float32, "forward", 8) == "looped"
    assert entries("sve", "float32", "forward") == ()


def test_an_entry_in_words_says_from_how_many_rows_on_another_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ((0, "grouped"), (32, "grouped"), (64, "looped"), (256, "kernel"))
    monkeypatch.setattr("dsv3.moe.fastest._entries", lambda *_: steps)
    said = in_words("none", torch.float32, "training")
    assert said == "grouped (looped from 64 rows, kernel from 256 rows)"
    monkeypatch.setattr("dsv3.moe.fastest._entries", lambda *_: steps[:2])
    assert in_words("none", torch.float32, "training") == "grouped"
    monkeypatch.setattr("dsv3.moe.fastest._entries", lambda *_: ())
    assert in_words("sve", torch.float32, "training") == "looped"
