"""The gate lets equal figures pass and nothing else, keeps what is accepted, and notes every run."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import gate
from bench.fingerprint import cpu_vendor
from bench.instructions import Comparison
from dsv3.attention.kernels import blocks
from dsv3.moe.dispatch import chosen_here
from tests.bench.gated import FIGURES, counting, row, with_peak


def test_equal_figures_pass(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main([]) == 0
    assert "2 cases equal" in capsys.readouterr().out
    assert [entry["reason"] for entry in json.loads(file.read_text()).values()] == ["first"]


@pytest.mark.parametrize(
    "found, line, code",
    [
        (
            {**FIGURES, "base": {**FIGURES["base"], "peak_bytes": 101}},
            "base.peak_bytes: expected 100, found 101 (+1)",
            1,
        ),
        ({**FIGURES, "base": {**FIGURES["base"], "peak_bytes": 99}}, "base.peak_bytes: expected 100, found 99 (-1)", 5),
        ({"base": FIGURES["base"]}, "plan_gpipe.bubble_slots: expected 36.0, found None", 5),
        ({**FIGURES, "new": {"flops": 1}}, "new.flops: expected None, found 1", 1),
        ({**FIGURES, "base": {"peak_bytes": 100, "operators": {}}}, "base.operators.aten.mm.default: expected 7", 5),
    ],
)
def test_any_difference_fails_worse_better_gone_or_new(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: Any, line: str, code: int
) -> None:
    monkeypatch.setattr(gate, "measure", lambda: found)
    capsys.readouterr()
    assert gate.main([]) == code
    out = capsys.readouterr().out
    assert out.startswith(line)
    assert re.search(r"^took \d+ s of CPU time, \d+ s in all$", out, flags=re.MULTILINE)
    assert "1 figures differ" in out
    assert gate.main(["--accept", "--reason", "meant"]) == 0
    assert gate.main([]) == 0


def test_an_unknown_key_has_a_code_of_its_own_and_keeps_the_others(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "key", lambda: "another machine")
    assert gate.main([]) == 3
    assert "no expectations for another machine" in capsys.readouterr().out
    assert gate.main(["--accept", "--reason", "a second machine"]) == 0
    assert len(json.loads(file.read_text())) == 2


def test_an_unknown_key_fails_where_expectations_are_required(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "key", lambda: "another machine")
    assert gate.main(["--require"]) == 1


def test_figures_that_do_not_repeat_have_no_verdict(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = iter((90, 110))
    monkeypatch.setattr(gate, "measure", lambda: with_peak(next(peaks)))
    assert gate.main([]) == 4
    assert "unstable: 1 figures changed" in capsys.readouterr().out


def test_what_another_machine_saved_can_be_accepted_here(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "key", lambda: "another machine")
    saved = tmp_path / "found.json"
    dearer = Comparison("0" * 40, "AVX2", (row("base", 2_000_000),))
    counting(monkeypatch, dearer, dearer)
    assert gate.main(["--save", str(saved)]) == 1
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main(["--accept-from", str(saved), "--reason", "CI's processor"]) == 0
    rise = {"change": 1.0, "dispatched": 0, "gone": False}
    taken = {"reason": "CI's processor", "figures": FIGURES, "dearer": {"base": rise}}
    assert json.loads(file.read_text())["another machine"] == taken


def test_every_run_is_noted_and_the_unstable_ones_of_this_key_are_counted(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main([]) == 0
    peaks = iter((90, 110))
    monkeypatch.setattr(gate, "measure", lambda: with_peak(next(peaks)))
    assert gate.main([]) == 4
    assert "unstable in 1 of 2 runs on this key" in capsys.readouterr().out
    monkeypatch.setattr(gate, "key", lambda: "another machine")
    monkeypatch.setattr(gate, "measure", lambda: FIGURES)
    assert gate.main([]) == 3
    assert "unstable in 0 of 1 runs on this key" in capsys.readouterr().out
    noted = [json.loads(line) for line in (file.parent / "reports" / "out" / "gate.jsonl").read_text().splitlines()]
    assert [run["outcome"] for run in noted] == ["equal", "unstable", "unknown"]
    assert noted[1]["figures"] == ["base.peak_bytes"]
    assert [run["experts"] for run in noted] == [chosen_here()] * 3


def test_a_rise_is_not_made_up_for_by_a_saving(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "measure", lambda: {**with_peak(99), "plan_gpipe": {"bubble_slots": 37.0}})
    assert gate.main([]) == 1


def test_the_key_names_what_figures_depend_on() -> None:
    version, python, kernels, threads = gate.place().split(", ")
    assert version == f"torch {torch.__version__}"
    assert python == f"python {sys.version_info.major}.{sys.version_info.minor}"
    assert kernels == f"{cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}"
    assert threads == "1 thread"


@pytest.mark.parametrize("reason, said", [(None, "C++ kernel"), ("there is no C++ compiler", "no C++ kernel")])
def test_the_key_of_our_own_figures_names_the_kernel_as_well(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, said: str
) -> None:
    monkeypatch.setattr(blocks, "why_not", lambda: reason)
    assert gate.key() == f"{gate.place()}, {said}"


@given(st.dictionaries(st.text(max_size=3), st.integers()), st.dictionaries(st.text(max_size=3), st.integers()))
def test_there_are_no_differences_only_between_equals(expected: dict[str, int], found: dict[str, int]) -> None:
    assert (not list(gate.differences(expected, found))) == (expected == found)
