"""The gate lets equal figures pass and nothing else, and sees one tensor more in a training step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import gate, variants
from dsv3.config import digest
from dsv3.model import cost

FIGURES: dict[str, dict[str, Any]] = {
    "base": {"peak_bytes": 100, "operators": {"aten.mm.default": 7}},
    "plan_gpipe": {"bubble_slots": 36.0},
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expectations file of its own, with FIGURES accepted for this key."""
    path = tmp_path / "expectations.json"
    monkeypatch.setattr(gate, "EXPECTATIONS", path)
    monkeypatch.setattr(gate, "measure", lambda: FIGURES)
    assert gate.main(["--accept", "--reason", "first"]) == 0
    return path


def test_equal_figures_pass(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main([]) == 0
    assert "2 cases equal" in capsys.readouterr().out
    assert [entry["reason"] for entry in json.loads(file.read_text()).values()] == ["first"]


@pytest.mark.parametrize(
    "found, line",
    [
        ({**FIGURES, "base": {**FIGURES["base"], "peak_bytes": 101}}, "base.peak_bytes: expected 100, found 101 (+1)"),
        ({**FIGURES, "base": {**FIGURES["base"], "peak_bytes": 99}}, "base.peak_bytes: expected 100, found 99 (-1)"),
        ({"base": FIGURES["base"]}, "plan_gpipe.bubble_slots: expected 36.0, found None"),
        ({**FIGURES, "new": {"flops": 1}}, "new.flops: expected None, found 1"),
        ({**FIGURES, "base": {"peak_bytes": 100, "operators": {}}}, "base.operators.aten.mm.default: expected 7"),
    ],
)
def test_any_difference_fails_worse_better_gone_or_new(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: Any, line: str
) -> None:
    monkeypatch.setattr(gate, "measure", lambda: found)
    capsys.readouterr()
    assert gate.main([]) == 1
    out = capsys.readouterr().out
    assert out.startswith(line)
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


def test_accepting_needs_a_reason_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main(["--accept"]) == 2


def test_the_key_names_what_figures_depend_on() -> None:
    assert torch.__version__ in gate.key()
    assert "1 thread" in gate.key()


@given(st.dictionaries(st.text(max_size=3), st.integers()), st.dictionaries(st.text(max_size=3), st.integers()))
def test_there_are_no_differences_only_between_equals(expected: dict[str, int], found: dict[str, int]) -> None:
    assert (not list(gate.differences(expected, found))) == (expected == found)


def test_a_step_measures_the_same_twice_and_agrees_with_the_analytic_count() -> None:
    first = variants.measure_step(variants.base())
    assert first == variants.measure_step(variants.base())
    assert first["parameters"] == cost.parameters(variants.base().model)
    assert first["live_bytes"] > first["peak_bytes"] > first["saved_bytes"] > 0


def test_one_tensor_more_in_a_training_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = variants.measure_step(variants.base())
    step = variants.train_step

    def wasteful(*built: Any) -> None:
        torch.empty(1)
        step(*built)

    monkeypatch.setattr(variants, "train_step", wasteful)
    after = variants.measure_step(variants.base())
    assert list(gate.differences(before, after)) == [
        f"allocations: expected {before['allocations']}, found {before['allocations'] + 1} (+1)",
        f"operators.aten.empty.memory_format: expected {before['operators'].get('aten.empty.memory_format')}, "
        f"found {before['operators'].get('aten.empty.memory_format', 0) + 1}"
        + (" (+1)" if "aten.empty.memory_format" in before["operators"] else ""),
    ]


def test_no_two_variants_are_the_same_config() -> None:
    configs = variants.variants()
    assert len({digest(config) for config in configs.values()}) == len(configs)


def test_the_plans_idle_as_their_closed_forms_say() -> None:
    # GPipe and 1F1B: each of p ranks idles (p - 1) (f + b + w).
    plans = variants.measure_plans()
    idle = variants.RANKS * (variants.RANKS - 1) * 3.0
    assert plans["plan_gpipe"] == plans["plan_one_f_one_b"] == {"bubble_slots": idle}
