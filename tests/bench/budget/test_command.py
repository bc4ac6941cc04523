"""The command: what it prints and keeps, and that a question without an answer ends before torch is imported."""

import json
import resource
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bench.budget.__main__ import differing, main
from bench.budget.states import RECIPES
from bench.record import load
from dsv3.config import presets
from dsv3.model.hf.config import write_config

ROOT = Path(__file__).parents[3]
WITHOUT_TORCH = """
import sys
from bench.budget.__main__ import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


@pytest.mark.parametrize("name", [row.name for row in RECIPES])
def test_the_command_prints_the_agreement_and_keeps_records(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--preset", "tiny", "--sequence", "32", "--recompute", "selective", "--recipe", name]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "arithmetic against it" in printed
    assert "scratch inside aten._scaled_dot_product_flash_attention" in printed
    assert "Where it can be traced, on one device, it is off by" in printed
    records = load(tmp_path / "records.jsonl").records
    device = [row for row in records if "select" in row.axes and "split" not in row.axes]
    by_arm = {(row.arm, row.metric): row.value for row in device}
    assert by_arm["analytic", "parameters"] == by_arm["traced", "parameters"] == 2_703_744
    assert by_arm["traced", "live_bytes"] == pytest.approx(by_arm["allocator", "live_bytes"], rel=0.05)
    assert {row.arm for row in records} == {"analytic", "traced", "allocator", "rank", "run", "published"}
    assert list((tmp_path / "machines").glob("*.json"))


def test_as_many_replicas_are_traced_as_the_question_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--sequence", "32", "--dp", "4", "--out", str(tmp_path)]) == 0
    assert "One of 4 replicas of the whole model" in capsys.readouterr().out
    records = load(tmp_path / "records.jsonl").records
    by_arm = {row.arm: row.value for row in records if row.metric == "sent_bytes" and row.arm != "rank"}
    assert by_arm == dict.fromkeys(("analytic", "traced"), 2 * 2 * 2_703_744 * 3 // 4)


def test_a_checkpoints_config_gives_the_budget_of_the_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(write_config(presets.deepseek_v3().model)))
    for place in (["--hf-config", str(tmp_path)], ["--preset", "deepseek_v3"]):
        assert main([*place, "--no-trace", "--out", str(tmp_path / "out")]) == 0
    values: dict[str, list[float]] = {}
    for row in load(tmp_path / "out" / "records.jsonl").records:
        if row.metric in ("rank_bytes", "sent_bytes"):
            values.setdefault(str(row.axes["model"]), []).append(row.value)
    assert len(values) == 2
    assert values["deepseek_v3"] == values[tmp_path.name]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--preset", "deepseek_v3", "--tp", "3"], "tp=3: must divide num_attention_heads=128; use"),
        (["--preset", "tiny", "--pp", "9"], "pp=9: must be at most num_hidden_layers=4"),
        (["--preset", "tiny", "--ep", "3", "--dp", "3"], "ep=3: must divide n_routed_experts=16"),
        (["--preset", "nobody"], "preset='nobody': must be one of tiny"),
        (["--preset", "tiny", "--sequence", "9999"], "sequence_length=9999: must be at most"),
        (["--preset", "tiny", "--recompute", "some"], "recompute='some': must be one of none"),
    ],
)
def test_a_question_without_an_answer_ends_before_torch(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "must be a folder with a config.json"),
        ("{", "config.json is not JSON"),
        ('{"hidden_size": 8}', "config.json model_type: missing"),
        ('{"model_type": "llama"}', "config.json model_type='llama': must be 'deepseek_v3'"),
    ],
)
def test_a_config_that_is_not_of_this_family_is_refused(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["--hf-config", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_arithmetic_asks_for_no_torch(tmp_path: Path) -> None:
    arguments = ["--preset", "deepseek_v3", "--no-trace", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_that_are_too_far_apart_are_named() -> None:
    printed = StringIO()
    console = Console(width=160, file=printed)
    near = {"flops": 1000, "optimizer_bytes": 0, "live_bytes": 133}
    answers = {"analytic": near, "traced": near | {"flops": 1005, "live_bytes": 130}, "allocator": {"live_bytes": 127}}
    assert not differing(answers, console)
    assert differing(answers | {"traced": near | {"flops": 1020}}, console)
    assert differing(answers | {"traced": near | {"optimizer_bytes": 1}}, console)
    assert differing(answers | {"analytic": near | {"live_bytes": 140}}, console)
    assert differing(answers | {"allocator": {"live_bytes": 120}}, console)
    assert "flops: analytic 1,000 and traced 1,020" in printed.getvalue()


@pytest.mark.slow
def test_a_true_size_takes_less_than_a_minute_of_cpu_time(tmp_path: Path) -> None:
    asked = ["--preset", "deepseek_v3", "--recompute", "selective", "--out", str(tmp_path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "bench.budget", *asked], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
