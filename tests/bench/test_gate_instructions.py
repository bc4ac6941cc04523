"""More instructions than the margins and an acceptance allow fail; fewer do not."""

import json
from pathlib import Path

import pytest

from bench import gate, instructions
from bench.expectations import accepted_since
from bench.instructions import Comparison, Count, Rise, Row
from tests.bench.gated import counting, row, with_peak


@pytest.mark.parametrize(
    "moved, code",
    [
        (row("base", 1_004_999), 0),
        (row("base", 1_005_001), 1),
        (row("base", 994_000), 0),
        (row("base", 1_000_000, dispatch=1000), 0),
        (row("base", 1_000_000, dispatch=1001), 1),
        (Row("base", Count(1, 1), None, "TypeError"), 1),
        (Row("base", None, Count(1, 1), "ImportError"), 0),
    ],
)
def test_more_instructions_than_the_margins_allow_fail_and_fewer_do_not(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moved: Row, code: int
) -> None:
    compared = Comparison("0" * 40, "AVX2", (moved, row("window", 1_000_000)))
    asked = counting(monkeypatch, compared, compared)
    capsys.readouterr()
    assert gate.main([]) == code
    assert asked == [(), ("base",)][: 1 + code]  # what is dearer is counted again, alone
    out = capsys.readouterr().out
    assert (str(moved) in out) == ("within" not in str(moved))


def test_instructions_that_are_dearer_only_once_have_no_verdict(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dearer, same = (Comparison("0" * 40, "AVX2", (row("base", found),)) for found in (2_000_000, 1_000_000))
    counting(monkeypatch, dearer, same)
    assert gate.main([]) == 4


def test_more_instructions_can_be_accepted_for_the_named_work_until_the_base_moves_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(file.read_text())
    dearer = Comparison("0" * 40, "AVX2", (row("base", 2_000_000), row("window", 1_000_000)))
    both = Comparison("0" * 40, "AVX2", (row("base", 2_000_000), row("window", 2_000_000)))
    counting(monkeypatch, dearer, dearer, both, both, dearer, dearer)
    assert gate.main(["--accept", "--reason", "a better norm"]) == 0
    monkeypatch.setattr(instructions, "json_at", lambda *_: before)
    assert gate.main([]) == 0
    assert "base: +100.000%, dispatch +0 was accepted since then: a better norm" in capsys.readouterr().out
    assert gate.main([]) == 1  # window was not named
    monkeypatch.setattr(instructions, "json_at", lambda *_: json.loads(file.read_text()))
    assert gate.main([]) == 1  # the base has the acceptance already: this rise is another


@pytest.mark.parametrize(
    "moved, code",
    [
        (row("base", 1_104_999, dispatch=21_000), 0),
        (row("base", 1_105_001), 1),
        (row("base", 1_100_000, dispatch=21_001), 1),
        (Row("base", Count(1, 1), None, "TypeError"), 1),
    ],
)
def test_an_acceptance_covers_a_rise_of_its_size_and_the_margins(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moved: Row, code: int
) -> None:
    before = json.loads(file.read_text())
    first = Comparison("0" * 40, "AVX2", (row("base", 1_100_000, dispatch=20_000),))
    later = Comparison("0" * 40, "AVX2", (moved,))
    counting(monkeypatch, first, later, later)
    assert gate.main(["--accept", "--reason", "a better norm"]) == 0
    assert "more instructions: base (+10.000%, dispatch +20,000)" in capsys.readouterr().out
    monkeypatch.setattr(instructions, "json_at", lambda *_: before)
    assert gate.main([]) == code


def test_work_that_was_accepted_as_lost_may_be_gone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(file.read_text())
    gone = Comparison("0" * 40, "AVX2", (Row("base", Count(1, 1), None, "TypeError"),))
    back = Comparison("0" * 40, "AVX2", (row("base", 2_000_000),))
    counting(monkeypatch, gone, gone, back, back)
    assert gate.main(["--accept", "--reason", "nobody used it"]) == 0
    monkeypatch.setattr(instructions, "json_at", lambda *_: before)
    assert gate.main([]) == 0
    assert gate.main([]) == 1


def test_of_two_acceptances_of_the_same_work_the_larger_holds() -> None:
    small, large = ({"change": change, "dispatched": 0, "gone": False} for change in (0.01, 0.2))
    entries = {
        "one": {"reason": "a", "figures": {}, "dearer": {"base": large}},
        "two": {"reason": "b", "figures": {}, "dearer": {"base": small}},
        "old": {"reason": "c", "figures": {}, "dearer": {"dense": small}},
    }
    ((work, (rise, _)),) = accepted_since(entries, {"old": entries["old"]}).items()
    assert (work, rise) == ("base", Rise(0.2))


def test_the_worst_of_structure_and_instructions_decides(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dearer = Comparison("0" * 40, "AVX2", (row("base", 2_000_000),))
    counting(monkeypatch, *[dearer] * 4)
    monkeypatch.setattr(gate, "measure", lambda: with_peak(99))
    assert gate.main([]) == 1
    monkeypatch.setattr(gate, "key", lambda: "another machine")
    assert gate.main([]) == 1


def test_without_valgrind_structure_decides_and_a_line_says_why(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main([]) == 0
    assert "instructions: not counted: no valgrind" in capsys.readouterr().out
    monkeypatch.setattr(gate, "measure", lambda: with_peak(101))
    assert gate.main([]) == 1
