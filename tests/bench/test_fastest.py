"""The command that finds the fastest dispatch: what it takes as a gain, what it measures, and what it writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import fastest
from bench.fastest import HEAD, main, ratios, winner
from bench.measured_table import write
from dsv3.moe.fastest import TABLE, table
from dsv3.moe.kernels.experts import why_not


def test_the_committed_table_has_each_kind_once_and_is_as_its_command_writes_it(tmp_path: Path) -> None:
    kinds = [(row["instructions"], row["dtype"], row["direction"], row["rows"]) for row in table()]
    assert len(set(kinds)) == len(kinds) > 0
    for row in table():
        given = {name: row[name] for name in ("kernel", "grouped") if name in row}
        assert row["fastest"] == winner(given)
        assert ("kernel" in given) == (row["instructions"] != "none")
    write(again := tmp_path / "again.toml", HEAD, table())
    assert again.read_text() == TABLE.read_text()


def test_a_dispatch_has_to_be_a_twentieth_faster() -> None:
    assert winner({"kernel": 0.94, "grouped": 0.93}) == "grouped"
    assert winner({"kernel": 0.96, "grouped": 1.2}) == "looped"
    assert winner({}) == "looped"


@pytest.mark.parametrize("direction", ["forward", "training"])
def test_every_other_dispatch_is_timed(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "BLOCKS", 1)
    assert ratios("none", torch.float32, direction, 8, 256).keys() == {"grouped"}
    if why_not() is None:
        found = ratios("portable", torch.bfloat16, direction, 8, 256)
        assert found.keys() == {"kernel", "grouped"}
        assert min(found.values()) > 0


def test_entries_of_sets_that_the_machine_lacks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old = tmp_path / "fastest.toml", {"instructions": "none", "rows": 8}

    def found(instructions: str) -> Iterator[dict[str, Any]]:
        yield {"instructions": instructions, "rows": 16}

    monkeypatch.setattr(fastest, "TABLE", file)
    monkeypatch.setattr(fastest, "table", lambda: [{"instructions": "sve", "rows": 8}, old])
    monkeypatch.setattr(fastest, "why_not", lambda: "no compiler")
    monkeypatch.setattr(fastest, "_in_a_process", found)
    assert main([]) == 0
    write(wanted := tmp_path / "wanted.toml", HEAD, [{"instructions": "sve", "rows": 8}, *found("none")])
    assert file.read_text() == wanted.read_text()


def test_only_the_sets_that_are_asked_for_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old = tmp_path / "fastest.toml", [{"instructions": name, "rows": 8} for name in ("avx2", "none")]
    monkeypatch.setattr(fastest, "TABLE", file)
    monkeypatch.setattr(fastest, "table", lambda: old)
    monkeypatch.setattr(fastest, "why_not", lambda: None)
    monkeypatch.setattr(fastest, "instruction_sets", lambda: ("avx512", "avx2"))
    monkeypatch.setattr(fastest, "_in_a_process", lambda name: iter([{"instructions": name, "rows": 16}]))
    assert main(["--sets", "avx512", "avx512"]) == 0
    write(wanted := tmp_path / "wanted.toml", HEAD, [*old, {"instructions": "avx512", "rows": 16}])
    assert file.read_text() == wanted.read_text()
    with pytest.raises(SystemExit):
        main(["--sets", "sse"])
