"""Whether figures repeat: fresh processes side by side, and the history of runs."""

from pathlib import Path
from typing import Any

import pytest

from bench import gate, stability
from bench.stability import Run, history, note, said

FIRST = Run(time="2026-01-01T00:00:00+00:00", key="here", revision="abc", outcome="equal")
SHAKY = Run(
    time="2026-01-02T00:00:00+00:00",
    key="here",
    revision="abc",
    outcome="unstable",
    figures=("base.flops",),
    experts={"float32 training": "kernel"},
)


def test_runs_are_kept_as_they_were_noted(tmp_path: Path) -> None:
    note(tmp_path / "new" / "gate.jsonl", FIRST)
    found = note(tmp_path / "new" / "gate.jsonl", SHAKY)
    assert found.runs == (FIRST, SHAKY)
    assert str(found) == "unstable in 1 of 2 runs on this key"


def test_lines_that_cannot_be_read_are_counted_and_cost_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "gate.jsonl"
    note(path, FIRST)
    with path.open("ab") as file:
        file.write(b'[1]\n{"time": "x"}\n\xff\n{"torn')
    found = note(path, SHAKY)
    assert found.runs == (FIRST, SHAKY)
    assert "4 lines could not be read" in str(found)
    assert history(path) == found


def test_figures_that_moved_are_named_with_how_often(capsys: pytest.CaptureFixture[str]) -> None:
    still: dict[str, Any] = {"base": {"flops": 1, "peak_bytes": 2}}
    moved = {"base": {"flops": 1, "peak_bytes": 3}}
    assert said("structure", [still, still, still]) == 0
    assert said("structure", [still, moved, still, moved]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "structure: 2 figures identical in 3 of 3 fresh processes",
        "structure: base.peak_bytes moved in 2 processes",
        "structure: 2 figures identical in 2 of 4 fresh processes",
    ]


@pytest.mark.parametrize("moved, code", [(0, 0), (1, 4)])
def test_repeating_fails_where_a_figure_moved(monkeypatch: pytest.MonkeyPatch, moved: int, code: int) -> None:
    monkeypatch.setattr(gate, "repeat", lambda times: {"structure": moved, "instructions": 0} if times == 20 else {})
    assert gate.main(["--repeat", "20"]) == code


def test_each_repetition_measures_anew(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = iter((1, 1, 2))
    monkeypatch.setattr(stability, "why_not", lambda: "no valgrind")
    monkeypatch.setattr(stability, "structure_once", lambda _: {"base": {"peak_bytes": next(peaks)}})
    assert stability.repeat(3) == {"structure": 1}
    out = capsys.readouterr().out
    assert "instructions: not counted: no valgrind" in out
    assert "identical in 2 of 3" in out


def test_repeating_once_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gate.main(["--repeat", "1"])
    assert "at least 2" in capsys.readouterr().err
