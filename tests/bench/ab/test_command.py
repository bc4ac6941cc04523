"""python -m bench.ab: refuses early, stops when it can, goes on where it was, and works end to end."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.ab import __main__ as command
from bench.ab import block, recording
from bench.ab.block import Block, BrokenHead
from bench.ab.turns import ARMS, SLOWED
from bench.revision import ROOT

SECONDS = {arm: [0.001] * 12 for arm in (*ARMS, *SLOWED)}


def measured(head: float, control: float = 1.0) -> Block:
    """A block of 10 seconds in which the head takes so many times as long."""
    arms = SECONDS | {"head": [0.001 * head] * 12, "control": [0.001 * control] * 12}
    return Block(seconds={"decode": arms}, unable={}, took=10.0, load=1.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A gate that measures nothing: the numbers of the blocks it would have, of a head that is a fifth slower."""
    numbers: list[int] = []

    @contextmanager
    def folders(revision: str) -> Iterator[dict[str, Path]]:
        yield dict.fromkeys(ARMS, Path(revision))

    def run(trees: Any, cases: Any, number: int, random: Any) -> Block:
        numbers.append(number)
        return measured(1.2)

    monkeypatch.setattr(recording, "trees", folders)
    monkeypatch.setattr(recording, "content", lambda tree: "h" * 64)
    monkeypatch.setattr(block, "run", run)
    return numbers


def test_it_stops_when_every_case_is_decided(machine: list[int], tmp_path: Path, capsys: Any) -> None:
    assert command.compare("b" * 40, ("decode",), 600.0, tmp_path) == 1
    assert machine == list(range(6)), "six bets of six won make 47 of 1; 2 / 5% are needed"
    out = capsys.readouterr().out
    assert "slower" in out
    assert "1.200" in out
    assert "the base against itself was called different: 0 of 1 (95%: 0.0% to 97.5%)" in out


def test_it_stops_before_a_block_that_would_pass_the_budget(machine: list[int], tmp_path: Path, capsys: Any) -> None:
    assert command.compare("b" * 40, ("decode",), 35.0, tmp_path) == 3
    assert machine == [0, 1, 2]
    assert "a larger --budget goes on" in capsys.readouterr().out


def test_the_same_command_goes_on_and_a_decided_one_measures_nothing(machine: list[int], tmp_path: Path) -> None:
    assert command.compare("b" * 40, ("decode",), 25.0, tmp_path) == 3
    assert command.compare("b" * 40, ("decode",), 600.0, tmp_path) == 1
    assert machine == list(range(6))
    assert command.compare("b" * 40, ("decode",), 600.0, tmp_path) == 1
    assert machine == list(range(6))


def test_lines_left_out_are_named(machine: list[int], tmp_path: Path, capsys: Any) -> None:
    assert command.compare("b" * 40, ("decode",), 25.0, tmp_path) == 3
    with next((tmp_path / "ab").iterdir()).open("a") as file:
        file.write("torn")
    assert command.compare("b" * 40, ("decode",), 25.0, tmp_path) == 3
    assert ".jsonl:3 left out: JSONDecodeError" in capsys.readouterr().out


def test_a_failed_control_withdraws_the_verdicts(
    machine: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(block, "run", lambda *_: measured(1.2, control=1.2))
    assert command.compare("b" * 40, ("decode",), 600.0, tmp_path) == 4
    out = capsys.readouterr().out
    assert "withdrawn" in out
    assert "slower" not in out
    assert "the base differs from itself in decode" in out


def test_nothing_comparable_says_why(
    machine: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    nothing = Block(seconds={}, unable={"decode": "base: ImportError: no"}, took=1.0, load=1.0)
    monkeypatch.setattr(block, "run", lambda *_: nothing)
    assert command.compare("b" * 40, ("decode",), 600.0, tmp_path) == 3
    out = capsys.readouterr().out
    assert "decode is not comparable: base: ImportError: no" in out
    assert "--budget" not in out


@pytest.mark.parametrize(
    "error, said",
    [
        (
            BrokenHead("decode: head: ImportError: no"),
            "the working tree fails where the base does not:\ndecode: head: Imp",
        ),
        (RuntimeError("the process of a block ended with code -9"), "ended with code -9\nThe blocks before are kept"),
    ],
)
def test_a_run_that_fails_fails_and_keeps_the_blocks_before(
    machine: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception, said: str
) -> None:
    def fails(*_: Any) -> Block:
        raise error

    assert command.compare("b" * 40, ("decode",), 25.0, tmp_path) == 3
    monkeypatch.setattr(block, "run", fails)
    monkeypatch.setattr(command, "resolve", lambda revision: "b" * 40)
    assert command.main(["main", "-k", "decode", "--out", str(tmp_path)]) == 6
    assert said in capsys.readouterr().err
    assert len(next((tmp_path / "ab").iterdir()).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["no-such-revision"], "revision='no-such-revision': must name a commit"),
        (["HEAD", "-k", "nap"], "-k='nap': must be one of step_two_processes, step_base"),
        (["HEAD", "--budget", "0"], "budget=0.0: must be above 0 seconds"),
        (["HEAD", "--budget", "nan"], "budget=nan: must be above 0 seconds"),
        ([], "revision=None: must name the base"),
        (["--calibrate", "--budget", "-1"], "budget=-1.0: must be above 0"),
    ],
)
def test_a_bad_command_is_refused_with_its_remedy(arguments: list[str], said: str, capsys: Any) -> None:
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_bad_command_is_refused_before_torch_is_imported() -> None:
    code = "import sys; from bench.ab.__main__ import main; print(main(['nope']), 'torch' in sys.modules)"
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_cases_come_in_their_own_order_and_wall_time_only_when_asked_for(capsys: Any) -> None:
    assert command.selected(["decode", "step_base"]) == ("step_base", "decode")
    assert "step_two_processes" not in command.selected(None)
    assert command.selected(["step_two_processes"]) == ("step_two_processes",)
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "step_two_processes (wall time) only when named" in " ".join(capsys.readouterr().out.split())


def test_the_bar_says_how_far_it_is() -> None:
    console = Console(record=True, force_terminal=True, width=80)
    blocks = [measured(1.0)]
    with command.bar(console) as progress:
        command.gather(
            blocks, measure=lambda number: measured(1.0), keep=lambda made: None, budget=600.0, progress=progress
        )
        text = progress.tasks[0].description
    assert text == "block 5, 0 of 1 cases decided"
    assert len(blocks) == 5


@pytest.mark.slow
def test_two_blocks_of_a_real_case_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    once = command.spent
    monkeypatch.setattr(command, "spent", lambda blocks: once(blocks) if len(blocks) < 2 else 1e9)
    assert command.main(["HEAD", "-k", "decode", "--out", str(tmp_path)]) == 3
    (path,) = (tmp_path / "ab").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["cases"] for line in lines] == [["decode"]] * 2
    assert "not enough evidence" in capsys.readouterr().out
