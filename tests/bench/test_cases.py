"""The way of a case from its arms to records: one end to end, and what happens when an arm is wrong."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases
from bench.__main__ import figures, main, number
from bench.cases import Run, measure_arms, sessions
from bench.fingerprint import Provenance
from bench.measurement import Measurement, Point
from bench.meters.energy import Absent
from bench.meters.paired import process_clock
from bench.record import Record, load

ROOT = Path(__file__).parents[2]


class OneRound:
    """pytest-benchmark's fixture as a case sees it; every round runs."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group: str | None = None

    def pedantic(self, target: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            target()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(out=tmp_path, device="cpu", provenance=Provenance(machine="m", revision="r", profile="quick"))


def ask(
    run: Run,
    check: Callable[[], None],
    arm: Callable[[], object] = lambda: sum(range(1000)),
    phase: str = "forward",
) -> None:
    measure_arms(
        run,
        OneRound(),
        study="bench_sums",
        phase=phase,
        baseline="sum",
        arms={"sum": lambda: sum(range(1000)), "arm": arm},
        check=check,
        axes={"terms": 1000},
        blocks=2,
        tokens=10,
        flops=1000.0,
    )


def kept(run: Run) -> tuple[Record, ...]:
    return load(run.out / "records.jsonl").records


def test_every_arm_leaves_its_figures(run: Run) -> None:
    ask(run, check=lambda: None)
    found = {(record.arm, record.metric): record for record in kept(run)}
    seconds = {"cpu_seconds", "wall_seconds", "tokens_per_second", "ceiling_share"}
    assert {metric for arm, metric in found if arm == "sum"} == seconds
    assert {metric for arm, metric in found if arm == "arm"} == seconds | {"forward_cpu_ratio", "forward_wall_ratio"}
    ratio = found["arm", "forward_cpu_ratio"]
    assert (ratio.n, ratio.over, ratio.baseline, ratio.error) == (2, "blocks", "sum", None)
    assert ratio.axes == {"terms": 1000, "device": "cpu", "phase": "forward", "threads": 1}


def test_a_failed_check_times_nothing_and_leaves_errors(run: Run) -> None:
    def wrong() -> None:
        raise AssertionError("arm differs from sum by 3")

    def never() -> None:
        raise RuntimeError("was timed")

    with pytest.raises(AssertionError, match="differs"):
        ask(run, check=wrong, arm=never)
    errors = {(record.arm, record.metric): record.error for record in kept(run)}
    assert set(errors.values()) == {"AssertionError: arm differs from sum by 3"}
    assert ("arm", "forward_cpu_ratio") in errors
    assert ("sum", "cpu_seconds") in errors


def test_an_arm_that_breaks_leaves_errors_too(run: Run) -> None:
    def breaks() -> None:
        raise MemoryError("16 GiB wanted")

    with pytest.raises(MemoryError):
        ask(run, check=lambda: None, arm=breaks)
    assert {record.error for record in kept(run)} == {"MemoryError: 16 GiB wanted"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_fails_its_case_by_name_and_the_others_are_kept(run: Run, value: float) -> None:
    point = Point(study="bench_sums", arm="sum")
    figures = [Measurement(metric="parameters", value=7), Measurement(metric="loss", value=value)]
    with pytest.raises(ValueError, match=f"sum: loss is {value}, which is no finite number"):
        run.keep(point, [*figures, Measurement(metric="flops", value=8)])
    kept = load(run.out / "records.jsonl").records
    assert [(row.metric, row.value, row.error is None) for row in kept] == [
        ("parameters", 7, True),
        ("loss", None, False),
        ("flops", 8, True),
    ]


def test_cpu_time_decides_at_one_thread_and_wall_time_stands_at_all_cores() -> None:
    one, every = sessions("cpu")
    assert (one.threads, one.hands, every.hands) == (1, ("cpu",), ("wall",))
    (gpu,) = sessions("cuda")
    assert gpu.hands == ("wall",)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as cases look at it: wall time on the CPU's clock, a ceiling, a card of unknown peak, no NVML."""
    wall = cases.Session(threads=None, clock=process_clock, hands=("wall",))
    monkeypatch.setattr(cases, "sessions", lambda device: (wall,))
    monkeypatch.setattr(cases, "gemm_rate", lambda *_, **__: Measurement(metric="gemm_flops_per_second", value=1e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 3000")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cases, "energy", lambda call, *, tokens, index: Absent("NVML finds no driver"))


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_what_cannot_be_had_is_pending_and_says_why(run: Run) -> None:
    ask(replace(run, device="cuda"), check=lambda: None, phase="step")
    found = {(record.arm, record.metric): record for record in kept(run)}
    assert found["arm", "mfu"].error == (
        "pending: peak unknown for Abacus 3000 in float32; add it to bench/peaks.toml with its source"
    )
    assert found["arm", "energy_per_token"].error == "pending: NVML finds no driver"
    assert found["arm", "step_wall_ratio"].axes == {"terms": 1000, "device": "cuda", "phase": "step"}
    assert not any(metric == "cpu_seconds" for _, metric in found)


@pytest.mark.usefixtures("gpu")
def test_on_a_known_gpu_a_step_has_its_share_of_the_peak_and_its_energy(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_joules(call: Callable[[], None], *, tokens: int, index: int) -> tuple[Measurement, ...]:
        call()
        return (Measurement(metric="energy_per_token", value=2.0 / tokens),)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(cases, "energy", two_joules)
    ask(replace(run, device="cuda"), check=lambda: None, phase="step")
    found = {(record.arm, record.metric): record for record in kept(run)}
    seconds = found["arm", "wall_seconds"].value
    assert seconds is not None
    assert found["arm", "mfu"].value == pytest.approx(1000.0 / 8.1e12 / seconds)
    assert found["arm", "energy_per_token"].value == 0.2


def test_one_case_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would not repeat anything
    command = [sys.executable, "-m", "bench", "layers", "--out", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "new" / "records.jsonl"
    assert done.stdout.splitlines()[-1] == f"6 records in {path}"
    records = load(path).records
    assert {record.study for record in records} == {"bench_layers"}
    (ratio,) = (record for record in records if record.metric == "forward_backward_cpu_ratio")
    assert ratio.n >= 7
    assert "forward_backward_cpu_ratio" in done.stdout
    (theirs,) = (tmp_path / "new" / "benchmarks").glob("*.json")
    told = json.loads(theirs.read_text())
    assert told["machine_info"]["dsv3"]["machine"] == ratio.machine
    shown = told["benchmarks"][0]["extra_info"]["figures"]["dsv3.layers.RMSNorm"]["forward_backward_cpu_ratio"]
    assert shown["value"] == ratio.value
    assert (tmp_path / "new" / "machines" / f"{ratio.machine}.json").exists()


def test_an_expression_that_names_no_case_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "layers", "--out", str(tmp_path), "-k", "no_such_case"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "does -k 'no_such_case' name one?" in done.stderr


def test_a_room_without_cases_is_told_with_those_that_have_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layer"]) == 2
    assert "no cases of layer; there are cases of" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_missing_gpu_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no GPU here" in line


def test_a_missing_package_is_one_line_that_never_installs_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("bench.__main__.find_spec", lambda name: None if name == "pytest_benchmark" else object())
    assert main(["--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("python -m pip install pytest-benchmark")


def test_numbers_are_shown_short_and_whole_ones_whole() -> None:
    assert [number(value) for value in (671026404352, 0.123456, 2.0)] == ["671,026,404,352", "0.1235", "2"]


def test_an_error_is_shown_in_place_of_the_value(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        ask(run, check=lambda: 1 // 0)  # type: ignore[arg-type]
    assert figures(kept(run)[0]) == ("error: ZeroDivisionError: integer division or modulo by zero", "", "0")
