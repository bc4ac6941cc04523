"""A study on a Ray cluster gives the records of a local run; what another machine measured is refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ablations import __main__ as command
from ablations.cache import cell_key, done
from ablations.cell import READINGS_FAILED, order
from ablations.ray_cluster import There, _keep, _require_nodes, _resources, measured_there
from ablations.run import remaining, run
from ablations.study import Cell, Study
from bench.fingerprint import cores, machine_id, saved
from bench.record import Record, load

COIN = Path(__file__).with_name("coin_study.py")
ROOT = COIN.parents[2]

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray: pip install "dsv3[ray]"')


def told(out: Path) -> set[tuple[object, ...]]:
    def said(row: Record) -> tuple[object, ...]:
        return row.id, row.value, row.error

    loaded = load(out / "records.jsonl")
    assert not loaded.skipped
    return set(map(said, loaded.records))


@pytest.fixture
def on_ray(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    quiet = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}

    def on_ray(**environment: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", "ablations", "run", str(COIN), "--on", "ray", "--out", str(tmp_path / "ray")]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=quiet | environment, timeout=300)

    return on_ray


@needs_ray
def test_a_local_cluster_gives_the_records_of_a_local_run_and_runs_no_cell_twice(
    coin: Study, tmp_path: Path, on_ray: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        finished = on_ray(COIN_LOG=str(log), COIN_QUIET="1")
        assert finished.returncode == 0, finished.stderr
    assert log.read_text().count("start") == 4
    here = tmp_path / "here"
    quiet = tuple(replace(cell, timed=False) for cell in coin.cells("quick"))
    assert not [wrong for wrong in run(str(COIN), coin, quiet, "quick", here, print) if wrong]
    assert told(tmp_path / "ray") == told(here)
    assert done(tmp_path / "ray") == done(here)


@needs_ray
def test_a_cell_that_dies_on_a_node_leaves_error_records_and_the_rest_goes_on(
    tmp_path: Path, on_ray: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    finished = on_ray(COIN_DIES="bent", COIN_QUIET="1")
    assert finished.returncode == 1
    assert "killed by SIGKILL" in finished.stderr
    rows = load(tmp_path / "ray" / "records.jsonl").records
    assert {row.error for row in rows if row.arm == "bent"} == {"killed by SIGKILL; out of memory?"}
    assert len([row for row in rows if row.arm == "fair"]) == 4


def test_without_ray_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command.main(["run", str(COIN), "--on", "ray", "--out", str(tmp_path)]) == 2
    assert "Ray is not installed" in (said := capsys.readouterr().err)
    assert 'pip install "dsv3[ray]"' in said


def test_a_task_hands_back_what_its_cell_wrote_and_the_driver_keeps_it(coin: Study, tmp_path: Path) -> None:
    cell = coin.cells("quick")[0]
    there = measured_there(order(str(COIN), cell, "quick", Path()), 60)
    assert (there.status, there.said, there.key) == (0, "", cell_key(coin, cell, "quick"))
    assert sorted(there.files) == ["cells.jsonl", "records.jsonl"]
    assert _keep(coin, cell, "quick", tmp_path, there) == ""
    assert cell not in remaining(coin, "quick", tmp_path).left
    assert len(load(tmp_path / "records.jsonl").records) == 2
    assert saved(tmp_path, machine_id())["machine"] == machine_id()


@pytest.mark.parametrize("broken", [{}, {"COIN_NAN": "fair"}])
def test_what_another_machine_measured_is_refused_also_where_a_reading_failed(
    coin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: dict[str, str]
) -> None:
    cell = coin.cells("quick")[0]
    for name, value in broken.items():
        monkeypatch.setenv(name, value)
    there = measured_there(order(str(COIN), cell, "quick", Path()), 60)
    assert there.status == (READINGS_FAILED if broken else 0)
    assert ("cells.jsonl" in there.files) == (not broken)
    monkeypatch.setattr("ablations.cache.machine_id", lambda: "another")
    said = _keep(coin, cell, "quick", tmp_path, there)
    assert said == "refused: its node has other code, or is another machine than this one"
    assert list(tmp_path.iterdir()) == []


def test_what_measures_no_time_may_come_from_another_machine(coin: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = coin.cells("quick")[0]
    names = [cell_key(coin, cell, "quick") for cell in (timed, replace(timed, timed=False))]
    monkeypatch.setattr("ablations.cache.machine_id", lambda: "another")
    assert cell_key(coin, timed, "quick") != names[0]
    assert cell_key(coin, replace(timed, timed=False), "quick") == names[1]


def test_of_a_reading_that_failed_the_good_ones_are_kept_and_the_cell_is_left(
    coin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = coin.cells("quick")[0]
    monkeypatch.setenv("COIN_NAN", "fair")
    assert _keep(coin, cell, "quick", tmp_path, measured_there(order(str(COIN), cell, "quick", Path()), 60)) == ""
    assert [row.error is None for row in load(tmp_path / "records.jsonl").records] == [False, True]
    assert cell in remaining(coin, "quick", tmp_path).left


def test_a_task_that_wrote_nothing_leaves_nothing(coin: Study, tmp_path: Path) -> None:
    lost = There(status=-9, said="lost")
    assert _keep(coin, coin.cells("quick")[0], "quick", tmp_path, lost) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_measures_time_takes_a_whole_node() -> None:
    known = {"arm": None, "seed": 0, "axes": {}, "seconds": 1}
    assert _resources(Cell(**known)) == {"num_cpus": cores()}  # type: ignore[arg-type]
    assert _resources(Cell(**known, timed=False)) == {"num_cpus": 1}  # type: ignore[arg-type]
    cuda = Cell(**known, device="cuda")  # type: ignore[arg-type]
    assert _resources(cuda) == {"num_cpus": 1, "num_gpus": 1}
    _require_nodes([{"Resources": {"CPU": 1.0}}, {"Resources": {"CPU": 4.0, "GPU": 1.0}}], [cuda])
    with pytest.raises(ValueError, match=r"on='ray': must have a node with {'CPU': 1, 'GPU': 1}"):
        _require_nodes([{"Resources": {"CPU": 64.0}}], [cuda])
