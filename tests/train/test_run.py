"""A whole run.

Killed and resumed it ends in the same bits; its folder is never overwritten unasked; bad input is told first.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.config import Config, Data, vary
from dsv3.resilience import found, load_latest
from dsv3.train import run
from dsv3.train.log import Log
from dsv3.train.step import StepReport
from tests.train import small

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Data]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", small.cache(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")  # in processes that start here: sums in one order
        yield small.book(tmp_path_factory.mktemp("text"))


def command(data: Data, out: Path, *more: str) -> list[str]:
    fields = "--steps 40 --data.validation 0.2 --data.test 0.2 --model.vocab-size 300 --model.hidden-size 32 --quiet "
    fields += "--train.batch-size 4 --train.accumulation-steps 2 --train.sequence-length 16 --train.eval-every 10 "
    fields += "--train.eval-sequences 4 --train.checkpoint-every 5 --data"
    return [sys.executable, "-m", "dsv3.train", *fields.split(), data.paths[0], "--out", str(out), *more]


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def results(log: Path) -> list[dict[str, object]]:
    return [line for line in lines(log) if line["kind"] in ("step", "validation")]


def kill_after(arguments: list[str], out: Path, step: int) -> None:
    process = subprocess.Popen(arguments, cwd=ROOT)
    while process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.02)
    while process.poll() is None and (out / "log.jsonl").read_text().count('"kind": "step"') < step:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before it ended"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits_as_one_that_was_not(text: Data, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(text, whole), cwd=ROOT, check=True)
    kill_after(command(text, broken), broken, step=12)
    kill_after(command(text, broken, "--resume"), broken, step=27)
    with (broken / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 28, "los')  # a line that a kill cut in two
    subprocess.run(command(text, broken, "--resume"), cwd=ROOT, check=True)
    (step, expected), (same_step, state) = (load_latest(out / "checkpoints") for out in (whole, broken))
    assert step == same_step == 40
    assert state["model"].keys() == expected["model"].keys()
    assert all(torch.equal(state["model"][name], expected["model"][name]) for name in expected["model"])
    moments = expected["optimizer"]["state"]
    assert all(
        torch.equal(state["optimizer"]["state"][index][name], moments[index][name])
        for index in moments
        for name in moments[index]
    )
    assert state["data"] == expected["data"]
    for one, other in zip(*(results(out / "log.jsonl") for out in (whole, broken)), strict=True):
        timeless = [{name: value for name, value in line.items() if "seconds" not in name} for line in (one, other)]
        assert timeless[0] == timeless[1]


def shortened(text: Data, **changes: Any) -> Config:
    fields = {"train.steps": 4, "train.sequence_length": 16, "train.checkpoint_every": 2, "train.eval_every": 2}
    return vary(small.config(), data=text, **{**fields, **changes})


def test_a_run_reports_every_step_and_evaluation(text: Data) -> None:
    seen: list[StepReport] = []
    result = run(shortened(text), seed=1, progress=False, on_step=seen.append)
    assert [report.step for report in result.reports] == [1, 2, 3, 4]
    assert result.reports == tuple(seen)
    assert [evaluation.step for evaluation in result.validation] == [2, 4]
    assert result.test.step == 4
    assert set(result.baselines) == {"unigram", "bigram", "lzma", "lzma of the whole split"}
    assert all(report.bits_per_byte is not None for report in result.reports)
    again = run(shortened(text), seed=1, progress=False)
    assert [report.losses for report in again.reports] == [report.losses for report in result.reports]
    other = run(shortened(text), seed=2, progress=False)
    assert other.reports[0].losses != result.reports[0].losses


def test_a_finished_run_can_be_resumed_and_keeps_its_reports(text: Data, tmp_path: Path) -> None:
    config = shortened(text)
    first = run(config, out=tmp_path, progress=False)
    second = run(config, out=tmp_path, resume=True, progress=False)
    assert second.reports == first.reports
    assert second.validation == first.validation
    assert second.test == first.test
    assert [line["kind"] for line in lines(tmp_path / "log.jsonl")].count("test") == 1


def test_a_folder_with_a_run_is_resumed_or_overwritten_but_only_when_asked(text: Data, tmp_path: Path) -> None:
    config = shortened(text)
    run(config, out=tmp_path, progress=False)
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run; resume it, overwrite it, or choose another folder"):
        run(config, out=tmp_path, progress=False)
    assert (tmp_path / "log.jsonl").read_text() == before
    run(vary(config, **{"train.steps": 2}), out=tmp_path, overwrite=True, progress=False)
    assert [checkpoint.step for checkpoint in found(tmp_path / "checkpoints")] == [2]


def test_resuming_another_config_names_what_differs(text: Data, tmp_path: Path) -> None:
    config = shortened(text)
    run(config, out=tmp_path, progress=False)
    other = vary(config, **{"train.optimizer.lr": 0.5, "model.moe.n_routed_experts": 8})
    with pytest.raises(ValueError, match=r"differs in model\.moe\.n_routed_experts \(saved 4, asked 8\); train\.opt"):
        run(other, out=tmp_path, resume=True, progress=False)


def test_resuming_with_another_seed_is_refused(text: Data, tmp_path: Path) -> None:
    run(shortened(text), out=tmp_path, seed=0, progress=False)
    with pytest.raises(ValueError, match="seed=1: the saved cursor has seed=0"):
        run(shortened(text), out=tmp_path, seed=1, resume=True, progress=False)


def test_resuming_on_other_text_is_refused(text: Data, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(text.paths[0]).read_text())
    config = shortened(vary(text, paths=(str(copy),)))
    run(config, out=tmp_path / "run", progress=False)
    copy.write_text(copy.read_text() + "more")
    with pytest.raises(ValueError, match="the checkpoint was trained on another corpus"):
        run(config, out=tmp_path / "run", resume=True, progress=False)


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_resumed(text: Data, tmp_path: Path) -> None:
    config = shortened(text)
    first = run(config, out=tmp_path, progress=False)
    damaged = found(tmp_path / "checkpoints")[-1].path / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"optimizer\.pt has 100 of \d+ bytes; the checkpoint of step 2 is used"):
        second = run(config, out=tmp_path, resume=True, progress=False)
    assert [report.losses for report in second.reports] == [report.losses for report in first.reports]
    assert second.test == first.test


def test_resuming_where_nothing_was_saved_starts_anew(text: Data, tmp_path: Path) -> None:
    result = run(shortened(text), out=tmp_path, resume=True, progress=False)
    assert len(result.reports) == 4
    with pytest.raises(ValueError, match="resume=True: needs the folder of the run"):
        run(shortened(text), resume=True, progress=False)


def test_bad_folders_and_data_are_told_before_any_step(text: Data, tmp_path: Path) -> None:
    def refuse(report: StepReport) -> None:
        raise AssertionError(f"a step was taken: {report}")

    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        run(shortened(text), out=tmp_path / "file" / "run", progress=False, on_step=refuse)
    with pytest.raises(ValueError, match="the folder holds no file"):
        run(shortened(Data(paths=(str(tmp_path / "empty"),))), progress=False, on_step=refuse)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": f"{index} words"}) + "\n" for index in range(9)))
    few = vary(text, paths=(str(tmp_path / "few.jsonl"),))
    with pytest.raises(ValueError, match=r"train\.sequence_length=60: is longer than"):
        run(shortened(few, **{"train.sequence_length": 60}), progress=False, on_step=refuse)


def test_skipped_files_are_named_in_the_result_and_the_log(text: Data, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(b"not gzip")
    config = shortened(vary(text, paths=(*text.paths, str(bad))))
    result = run(config, out=tmp_path / "run", progress=False)
    assert [skip.path for skip in result.skipped] == [str(bad)]
    (told,) = [line for line in lines(tmp_path / "run" / "log.jsonl") if line["kind"] == "run"]
    assert str(bad) in str(told["skipped"])


def test_gradients_that_stay_infinite_end_the_run_with_the_reason(text: Data) -> None:
    config = shortened(text, **{"model.moe": None, "model.mtp": None, "train.steps": 30, "train.optimizer.lr": 1e30})
    with pytest.raises(FloatingPointError, match="10 updates in a row were skipped"):
        run(config, progress=False)


def test_a_log_reads_back_what_was_written(tmp_path: Path) -> None:
    report = StepReport(
        step=1, losses={"main": 0.1}, grad_norm=1 / 3, lr=0.1, tokens=2, text_bytes=3, seconds=0.5,
        cpu_seconds=0.25, max_vio=(0.5, 2.0), dropped=0.0, health="ok",
    )  # fmt: skip
    log = Log(tmp_path / "log.jsonl")
    log.record("step", report)
    again = Log(tmp_path / "log.jsonl")
    again.resume(step=1)
    assert again.reports() == log.reports() == (report,)
    again.resume(step=0)
    assert again.reports() == ()
