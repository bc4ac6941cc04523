"""A failure of the gate itself is no verdict about costs, and what can be refused is refused before measuring."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import gate, instructions
from bench.instructions import Comparison
from tests.bench.gated import FIGURES, counting, row, with_peak


def test_accepting_needs_a_reason_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch, Comparison("0" * 40, "AVX2", ()))
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main(["--accept"]) == 2


@pytest.mark.parametrize("target", ["no/such/folder/found.json", "."])
def test_what_cannot_be_saved_is_refused_before_anything_is_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main(["--save", target]) == 2
    assert f"save={target!r}: must be a file in a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "must be a file"),
        ("<<<<<<<", "cannot be read"),
        ("[]", "must be an object"),
        ('{"key": "here"}', "must hold"),
        ('{"key": "here", "figures": {}, "dearer": ["base"]}', "must hold"),
        ('{"key": "here", "figures": {}, "dearer": {"base": {"much": 1}}}', "must hold"),
    ],
)
def test_a_file_that_nobody_saved_is_not_accepted(
    file: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    before = file.read_text()
    given = file.parent / "found.json"
    if content is not None:
        given.write_text(content)
    assert gate.main(["--accept-from", str(given), "--reason", "CI's"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"python -m bench.gate: accept_from={str(given)!r}: ")
    assert said in told
    assert file.read_text() == before


@pytest.mark.parametrize("content", ["<<<<<<< ours", '{"here": {"reason": "x"}}', '{"here": []}'])
def test_expectations_that_cannot_be_read_are_refused_before_anything_is_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file.write_text(content)
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main([]) == 2
    assert "restore it with git checkout" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file.read_text()

    def full(self: Path, text: str) -> None:
        with self.open("w") as handle:
            handle.write(text[:10])
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert gate.main(["--accept", "--reason", "again"]) == 2
    assert "disk full" in capsys.readouterr().err
    assert file.read_text() == before


def test_a_base_that_is_missing_is_said_by_default_and_an_error_when_asked_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions, "why_not", lambda: None)
    monkeypatch.setattr(instructions, "default_base", lambda: "no-such-revision")
    assert gate.main([]) == 0
    assert "instructions: not counted: revision='no-such-revision'" in capsys.readouterr().out
    assert gate.main(["--base", "no-such-revision"]) == 2
    assert "a shallow clone lacks older ones" in capsys.readouterr().err


FAILURES = (RuntimeError("counting instructions ended with exit code 1"), subprocess.TimeoutExpired("valgrind", 1800))


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("peak, code", [(100, 2), (101, 1)])
def test_instructions_that_cannot_be_counted_fail_and_structure_is_judged_noted_and_saved(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Exception,
    peak: int,
    code: int,
) -> None:
    counting(monkeypatch, failure)
    monkeypatch.setattr(gate, "measure", lambda: with_peak(peak))
    capsys.readouterr()
    assert gate.main(["--save", "found.json"]) == code
    out = capsys.readouterr().out
    assert ("2 cases equal" in out) == (code == 2)
    assert f"instructions: not counted: {type(failure).__name__}" in out
    assert json.loads(Path("found.json").read_text())["figures"] == with_peak(peak)
    (noted,) = (json.loads(line) for line in Path("reports/out/gate.jsonl").read_text().splitlines())
    assert noted["outcome"] == ("broken" if code == 2 else "dearer")


def test_counting_that_cannot_even_begin_fails_and_says_why(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def comparing(base: str) -> Iterator[None]:
        raise OSError("disk full")
        yield

    counting(monkeypatch)
    monkeypatch.setattr(instructions, "comparing", comparing)
    assert gate.main([]) == 2
    assert "2 cases equal" in (out := capsys.readouterr().out)
    assert "instructions: not counted: OSError: disk full" in out


def test_counting_again_that_fails_has_no_verdict(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch, Comparison("0" * 40, "AVX2", (row("base", 2_000_000),)), RuntimeError("killed"))
    assert gate.main([]) == 2


def test_figures_are_saved_before_instructions_are_waited_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def comparing(base: str) -> Iterator[Callable[[], Comparison]]:
        def killed() -> Comparison:
            raise KeyboardInterrupt

        yield killed

    counting(monkeypatch)
    monkeypatch.setattr(instructions, "comparing", comparing)
    with pytest.raises(KeyboardInterrupt):
        gate.main(["--save", "found.json"])
    assert json.loads(Path("found.json").read_text())["figures"] == FIGURES


def test_nothing_is_accepted_where_instructions_could_not_be_counted(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_text()
    counting(monkeypatch, RuntimeError("no"))
    monkeypatch.setattr(gate, "measure", lambda: with_peak(101))
    assert gate.main(["--accept", "--reason", "meant"]) == 2
    assert file.read_text() == before


def test_a_measurement_that_fails_is_no_rise_and_is_noted_and_shown(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("found.json").write_text("of an older run")
    monkeypatch.setattr(gate, "measure", lambda: 1 / 0)
    assert gate.main(["--save", "found.json"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert json.loads(Path("reports/out/gate.jsonl").read_text())["outcome"] == "broken"
    assert not Path("found.json").exists()
    monkeypatch.setattr(gate, "repeat", lambda times: 1 / 0)
    assert gate.main(["--repeat", "2"]) == 2
