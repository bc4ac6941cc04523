"""The gate lets equal figures pass and nothing else, and sees one tensor more in a training step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import gate, structure, variants
from dsv3.config import digest
from dsv3.model import Transformer, cost

FIGURES: dict[str, dict[str, Any]] = {
    "base": {"peak_bytes": 100, "operators": {"aten.mm.default": 7}},
    "plan_gpipe": {"bubble_slots": 36.0},
}


def with_peak(found: int) -> dict[str, dict[str, Any]]:
    """FIGURES with another peak."""
    return {**FIGURES, "base": {**FIGURES["base"], "peak_bytes": found}}


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
    assert gate.main(["--save", str(saved)]) == 3
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main(["--accept-from", str(saved), "--reason", "CI's processor"]) == 0
    assert json.loads(file.read_text())["another machine"] == {"reason": "CI's processor", "figures": FIGURES}


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
    first = structure.measure_step(variants.base())
    assert first == structure.measure_step(variants.base())
    assert first["parameters"] == cost.parameters(variants.base().model)
    assert first["live_bytes"] > first["peak_bytes"] > first["saved_bytes"] > 0
    # AdamW keeps two more numbers per parameter, and a step count for each tensor.
    tensors = sum(1 for _ in Transformer(variants.base().model, seed=0).parameters())
    model_bytes = sum(buffer.nbytes for buffer in Transformer(variants.base().model, seed=0).state_dict().values())
    assert first["checkpoint_bytes"] == model_bytes + first["parameters"] * 8 + tensors * 4


def test_one_tensor_more_in_a_training_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure.measure_step(variants.base())
    step = structure.train_step

    def wasteful(*built: Any) -> None:
        torch.empty(1)
        step(*built)

    monkeypatch.setattr(structure, "train_step", wasteful)
    changes = list(gate.differences(before, structure.measure_step(variants.base())))
    assert [change.where for change in changes] == ["allocations", "operators.aten.empty.memory_format"]
    assert all((change.found or 0) - (change.expected or 0) == 1 for change in changes)


@pytest.mark.parametrize("decode", [False, True])
def test_serving_measures_the_same_twice(decode: bool) -> None:
    found = structure.measure_serving(variants.served()["per_head"], decode=decode)
    assert found == structure.measure_serving(variants.served()["per_head"], decode=decode)
    assert found["flops"] > 0


def test_decoding_works_on_one_token_and_prefill_on_all() -> None:
    prefill, decode = (structure.measure_serving(variants.base(), decode=decode) for decode in (False, True))
    assert decode["flops"] < prefill["flops"] / variants.LENGTH * 2


def test_a_waiting_host_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure.measure_step(variants.base())["host_synchronisations"]
    step = structure.train_step

    def waiting(state: Any, rows: torch.Tensor) -> None:
        step(state, rows)
        rows.sum().item()

    monkeypatch.setattr(structure, "train_step", waiting)
    assert structure.measure_step(variants.base())["host_synchronisations"] == before + 1


def test_drops_are_the_loads_beyond_the_slots() -> None:
    moe = variants.base().model.moe
    assert moe is not None
    indices = structure.drawn_routing(moe)
    loads = indices.flatten().bincount(minlength=moe.n_routed_experts).tolist()
    slots = {factor: math.ceil(indices.numel() / moe.n_routed_experts * factor) for factor in structure.FACTORS}
    refused = {f"{factor:g}": sum(max(0, load - most) for load in loads) for factor, most in slots.items()}
    assert structure.measure_drops() == {"drops": refused}
    assert refused["1"] > 0


def test_two_processes_send_every_gradient_once() -> None:
    sent = structure.measure_two_processes()["two_processes"]["collectives"]
    gradients = 4 * cost.parameters(variants.base().model)
    assert gradients <= sum(row["bytes"] for row in sent.values()) < 1.01 * gradients


def test_no_two_variants_are_the_same_config() -> None:
    configs = variants.variants()
    assert len({digest(config) for config in configs.values()}) == len(configs)


def test_the_plans_idle_as_their_closed_forms_say() -> None:
    # GPipe and 1F1B: each of p ranks idles (p - 1) (f + b + w).
    plans = structure.measure_plans()
    idle = structure.PIPELINE_RANKS * (structure.PIPELINE_RANKS - 1) * 3.0
    assert plans["plan_gpipe"] == plans["plan_one_f_one_b"] == {"bubble_slots": idle}
