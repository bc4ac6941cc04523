import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from ablations import __main__ as command
from ablations.cache import marks
from ablations.catalogue import load as load_study
from ablations.comparison import Compared
from ablations.run import label, remaining, settle
from ablations.run import run as run_cells
from ablations.study import Cell
from ablations.verdicts import standing
from bench.fingerprint import cores
from bench.record import Record, append, load
from reports.frame import summary

COIN = Path(__file__).with_name("coin_study.py")
ROOT = COIN.parents[2]
CELLS = 4
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def run(out: Path, log: Path) -> Run:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "ablations", *(arguments or ("run", str(COIN), "--out", str(out)))]
        return subprocess.run(
            line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COIN_LOG": str(log)} | environment
        )

    return run


def records(out: Path) -> tuple[Record, ...]:
    loaded = load(out / "records.jsonl")
    assert not loaded.skipped
    return loaded.records


def unrevised(out: Path) -> list[Record]:
    """The records as of one revision, whatever is edited while the test runs: the revision is part of an id."""
    return [replace(row, revision="r") for row in records(out)]


def in_order(rows: Sequence[Record]) -> pd.DataFrame:
    """What the report shows of records, whatever the order in which they came."""
    table = summary(sorted(rows, key=lambda row: row.id))
    return table[["arm", "metric", "tosses", "value", "low", "high", "n"]]


def starts(log: Path) -> Counter[str]:
    return Counter(line for line in log.read_text().splitlines() if line.startswith("start"))


def cells_of(runner: "subprocess.Popen[bytes]") -> list[int]:
    """The processes of the cells in work."""
    children = Path(f"/proc/{runner.pid}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


def test_a_study_runs_each_cell_once_and_a_second_run_does_nothing(run: Run, out: Path, log: Path) -> None:
    first = run()
    assert first.returncode == 0, first.stderr
    before = (out / "records.jsonl").read_bytes()
    assert len(records(out)) == 2 * CELLS
    assert set(starts(log).values()) == {1}
    assert len(starts(log)) == CELLS
    study = load_study(str(COIN))
    assert {record.rule for record in records(out)} == {study.rule_digest()}
    assert {record.axes["device"] for record in records(out)} == {"cpu"}
    assert len(list((out / "machines").glob("*.json"))) == 1

    assert run().returncode == 0
    assert (out / "records.jsonl").read_bytes() == before
    assert not remaining(study, "quick", out).left
    assert len(remaining(study, "full", out).left) == 6 * CELLS, "another profile is another run"


def test_a_cell_whose_records_are_gone_runs_again(run: Run, out: Path, log: Path) -> None:
    run()
    path = out / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert run().returncode == 0
    assert sorted(starts(log).values()) == [1] * (CELLS - 1) + [2]


def test_a_cell_that_raises_leaves_error_records_and_the_rest_goes_on(run: Run, out: Path) -> None:
    done = run(COIN_RAISES="bent")
    assert done.returncode == 1
    assert "RuntimeError: the coin rolled away" in done.stderr
    failed = [record for record in records(out) if record.error]
    assert {(record.arm, record.error) for record in failed} == {("bent", "RuntimeError: the coin rolled away")}
    assert len(failed) == CELLS // 2
    assert len(records(out)) == CELLS // 2 + 2 * CELLS // 2

    again = run()
    assert again.returncode == 0, "what failed is tried again"
    assert sum(record.error is None for record in records(out)) == 2 * CELLS


def test_an_arm_that_fails_its_check_is_a_failure_and_one_that_is_pending_is_not(run: Run, out: Path) -> None:
    failed = run(COIN_FAILS="bent")
    assert failed.returncode == 1
    assert "bent tosses=1000 seed=0: bent: the coin stood on its edge" in failed.stderr
    assert {record.error for record in records(out)} == {None, "the coin stood on its edge"}
    assert run(COIN_PENDING="bent").returncode == 0
    assert "pending: no table to toss on" in {record.error for record in records(out)}


@pytest.mark.parametrize("quiet, abreast", [({}, 1), ({"COIN_QUIET": "1"}, cores())])
def test_a_runner_killed_at_any_moment_loses_at_most_the_cells_in_work(
    run: Run, out: Path, log: Path, quiet: dict[str, str], abreast: int
) -> None:
    environment = os.environ | {"COIN_LOG": str(log), "COIN_SLEEP": "0.5"} | quiet
    line = [sys.executable, "-m", "ablations", "run", str(COIN), "--out", str(out)]
    runner = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not (log.exists() and sum(starts(log).values()) >= 3):
        time.sleep(0.02)
        assert runner.poll() is None, "the runner ended before it was killed"
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    ended = log.read_text().count("end")
    time.sleep(1.0)
    assert log.read_text().count("end") == ended, "the cells in work end with their runner"
    begun, kept = len(starts(log)), len(marks(out))
    assert begun - kept <= abreast, "a cell that has ended is done, whatever its neighbours do"

    done = run(**quiet)
    assert done.returncode == 0, done.stderr
    assert sum(starts(log).values()) == CELLS + begun - kept, "what was done is not run again"
    assert len({mark.cell for mark in marks(out)}) == len(starts(log)) == CELLS
    assert len({record.id for record in records(out)}) == 2 * CELLS


@pytest.mark.skipif(not CHILDREN.exists(), reason="needs /proc to find the process of a cell")
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_of_cells_side_by_side_a_kill_of_one_loses_that_one(out: Path, log: Path) -> None:
    environment = os.environ | {"COIN_LOG": str(log), "COIN_SLEEP": "3", "COIN_QUIET": "1"}
    line = [sys.executable, "-m", "ablations", "run", str(COIN), "--out", str(out)]
    runner = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not (log.exists() and sum(starts(log).values()) >= 2):
        time.sleep(0.02)
        assert runner.poll() is None, "the runner ended before a cell was killed"
    os.kill(cells_of(runner)[0], signal.SIGKILL)
    assert runner.wait(120) == 1
    assert len(marks(out)) == CELLS - 1
    assert {row.error for row in records(out) if row.error} == {"killed by SIGKILL; out of memory?"}


@pytest.mark.skipif(not CHILDREN.exists(), reason="needs /proc to find the process of a cell")
@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments_leave_the_records_of_an_undisturbed_run(
    run: Run, out: Path, log: Path, tmp_path: Path, seed: int
) -> None:
    chance, kills = random.Random(seed), 4
    line = [sys.executable, "-m", "ablations", "run", str(COIN), "--out", str(out)]
    for _ in range(kills):
        environment = os.environ | {"COIN_LOG": str(log), "COIN_SLEEP": "0.3"}
        runner = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.5, 3.5))
        cells = cells_of(runner)
        for pid in chance.choice([[runner.pid], cells, [runner.pid, *cells]]):
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(pid, signal.SIGKILL)
        runner.wait(60)
    assert run().returncode == 0
    assert sum(starts(log).values()) <= CELLS + kills, "a kill costs at most the cell in work"

    quiet = tmp_path / "undisturbed"
    assert run("run", str(COIN), "--out", str(quiet), COIN_LOG=os.devnull).returncode == 0
    study, ours, theirs = load_study(str(COIN)), unrevised(out), unrevised(quiet)
    values = {row.id: row.value for row in theirs}
    assert {row.id: row.value for row in standing(study, ours)} == values, "what was killed was measured later"
    assert all(row.error or row.value == values[row.id] for row in ours), "no copy says otherwise"
    pd.testing.assert_frame_equal(*(in_order(standing(study, rows)) for rows in (ours, theirs)))


def test_a_cell_that_is_killed_when_it_has_written_everything_has_not_failed(out: Path) -> None:
    study = load_study(str(COIN))
    cell, other = study.cells("quick")[:2]
    assert list(run_cells(str(COIN), study, (cell,), "quick", out, print)) == [""]
    assert settle(study, cell, "quick", out, -signal.SIGKILL, "killed") == ""
    assert len(records(out)) == 2
    assert "killed" in settle(study, other, "quick", out, -signal.SIGKILL, "killed")
    assert [row.error for row in records(out)] == [None, None, "killed"]


def test_a_finished_study_takes_no_step_and_gives_the_same_report_to_the_byte(run: Run, out: Path, log: Path) -> None:
    from reports.build import build

    study = load_study(str(COIN))
    assert run().returncode == 0
    before, started = build(out, [study]).files, log.read_text()
    assert run().returncode == 0
    assert log.read_text() == started, "no process of a cell was started"
    assert build(out, [study]).files == before


def test_a_clone_of_a_finished_folder_takes_no_step(run: Run, out: Path, log: Path, tmp_path: Path) -> None:
    assert run().returncode == 0
    clone, names = tmp_path / "clone", [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    line = ("git", "check-ignore", *(f"reports/reference/{name}" for name in names))
    ignored = subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in names:
        if f"reports/reference/{name}" not in ignored:
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / name, clone / name)
    before = log.read_text()
    assert run("run", str(COIN), "--out", str(clone)).returncode == 0
    assert log.read_text() == before, "no process of a cell was started"


def test_a_figure_that_is_no_number_is_refused_by_name_and_the_others_are_kept(run: Run, out: Path) -> None:
    done = run(COIN_NAN="bent")
    assert done.returncode == 1
    assert "bent: loss is nan, which is no finite number" in done.stderr
    told = {(row.arm, row.metric): row.error for row in records(out)}
    assert told == {
        ("fair", "loss"): None,
        ("fair", "peak_bytes"): None,
        ("bent", "loss"): "loss is nan, which is no finite number",
        ("bent", "peak_bytes"): None,
    }
    assert run().returncode == 0, "it is tried again"
    assert not [row for row in standing(load_study(str(COIN)), records(out)) if row.error]


def test_a_study_of_one_seed_has_neither_interval_nor_verdict_and_still_has_a_page(run: Run, out: Path) -> None:
    from reports.build import build

    coin = load_study(str(COIN))
    study = replace(coin, compared=(Compared("loss", margin=0.01, why="a coin in a hundred"),))
    assert run().returncode == 0
    only = [row for row in records(out) if row.seed == 0]
    (out / "records.jsonl").unlink()
    append(out / "records.jsonl", only)
    report = build(out, [study]).files["report.md"].decode()
    compared = [line for line in report.splitlines() if line.startswith("| bent | ")]
    assert any(line.endswith("needs the full profile (1 of 6 seeds) |") for line in compared)


@pytest.mark.skipif(cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("quiet, abreast", [({}, False), ({"COIN_QUIET": "1"}, True)])
def test_cells_that_measure_no_time_run_side_by_side(run: Run, log: Path, quiet: dict[str, str], abreast: bool) -> None:
    assert run(COIN_SLEEP="2", **quiet).returncode == 0
    first = [line.split()[0] for line in log.read_text().splitlines()][:2]
    assert first == (["start", "start"] if abreast else ["start", "end"])
    assert sorted(starts(log).values()) == [1] * CELLS


@pytest.mark.parametrize("quiet", [{}, {"COIN_QUIET": "1"}])
def test_an_interrupted_run_stops_at_once_and_blames_no_cell(
    run: Run, out: Path, log: Path, quiet: dict[str, str]
) -> None:
    environment = os.environ | {"COIN_LOG": str(log), "COIN_SLEEP": "60"} | quiet
    line = [sys.executable, "-m", "ablations", "run", str(COIN), "--out", str(out)]
    # A shell that starts its jobs in the background has them ignore interrupts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    runner = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, preexec_fn=heed)
    while not log.exists():
        time.sleep(0.02)
        assert runner.poll() is None, "the runner ended before it was interrupted"
    os.kill(runner.pid, signal.SIGINT)
    assert runner.wait(30) == 130
    assert not (out / "records.jsonl").exists()


def test_a_torn_last_line_costs_its_cell_and_no_other(run: Run, out: Path, log: Path) -> None:
    run()
    path = out / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert run().returncode == 0
    assert sorted(starts(log).values()) == [1] * (CELLS - 1) + [2]
    assert len(load(path).skipped) == 1


def test_a_hung_cell_is_given_up(monkeypatch: pytest.MonkeyPatch, out: Path, log: Path) -> None:
    monkeypatch.setattr("ablations.run._START", 0.5)
    monkeypatch.setattr("ablations.run._PATIENCE", 0)
    monkeypatch.setenv("COIN_SLEEP", "60")
    study = load_study(str(COIN))
    wrong = list(run_cells(str(COIN), study, study.cells("quick")[:1], "quick", out, lambda cell: None))
    assert "gave up after" in wrong[0]
    assert "declare more seconds" in str(records(out)[0].error)


def test_a_cell_whose_process_is_killed_says_by_what(run: Run, out: Path) -> None:
    done = run(COIN_DIES="bent")
    assert done.returncode == 1
    errors = {record.error for record in records(out) if record.error}
    assert errors == {"killed by SIGKILL; out of memory?"}


def test_the_list_says_what_is_done_and_left(run: Run) -> None:
    told = run("list")
    assert told.returncode == 0
    for heading in ("study", "question", "cells", "done", "left", "expected hours"):
        assert heading in " ".join(told.stdout.split())


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["run", "moe_capcity"], "study='moe_capcity': must be one of the studies"),
        (["run"], "must name studies"),
        (["run", "--all", "attention_sparsity"], "must name studies, or be left out"),
        (["run", str(COIN), "--out", "/dev/null/out"], "/dev/null"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert error in " ".join(capsys.readouterr().err.split())


def test_a_label_tells_a_cell_apart() -> None:
    assert label(Cell(arm="a", seed=3, axes={"length": 5}, seconds=1)) == "a length=5 seed=3"
    assert label(Cell(arm=None, seed=None, axes={}, seconds=1)) == ""


def test_a_mark_names_the_records_of_its_cell(run: Run, out: Path) -> None:
    run()
    ids = {record.id for record in records(out)}
    assert len({mark.cell for mark in marks(out)}) == CELLS
    for mark in marks(out):
        assert len(mark.records) == 2
        assert mark.records <= ids
        assert mark.seconds >= 0
