"""The gate lets equal figures pass and nothing else, and sees one tensor more in a training step."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import gate, instructions, structure, variants
from bench.fingerprint import cpu_vendor
from bench.instructions import Comparison, Count, Row
from dsv3.config import digest
from dsv3.model import Transformer, cost

FIGURES: dict[str, dict[str, Any]] = {
    "base": {"peak_bytes": 100, "operators": {"aten.mm.default": 7}},
    "plan_gpipe": {"bubble_slots": 36.0},
}


def with_peak(found: int) -> dict[str, dict[str, Any]]:
    """FIGURES with another peak."""
    return {**FIGURES, "base": {**FIGURES["base"], "peak_bytes": found}}


def row(work: str, found: int, dispatch: int = 0) -> Row:
    """A piece of work that took 1,000,000 instructions at the base, 100,000 of them in dispatch."""
    return Row(work, Count(1_000_000, 100_000), Count(found, 100_000 + dispatch))


def counting(monkeypatch: pytest.MonkeyPatch, *answers: Comparison | str) -> list[tuple[str, ...]]:
    """Have instructions counted as given, one answer after the other; which work was asked for each time."""
    asked: list[tuple[str, ...]] = []
    left = iter(answers)

    @contextmanager
    def comparing(base: str, work: tuple[str, ...] = ()) -> Iterator[Callable[[], Comparison | str]]:
        asked.append(tuple(work))
        answer = next(left)
        if isinstance(answer, Comparison) and work:
            answer = replace(answer, rows=tuple(row for row in answer.rows if row.work in work))
        yield lambda: answer

    monkeypatch.setattr(instructions, "comparing", comparing)
    monkeypatch.setattr(instructions, "why_not", lambda: None)
    return asked


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expectations file of its own, with FIGURES accepted for this key; no instructions are counted."""
    path = tmp_path / "expectations.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(instructions, "why_not", lambda: "no valgrind")
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
    dearer = Comparison("0" * 40, "AVX2", (row("base", 2_000_000),))
    counting(monkeypatch, dearer, dearer)
    assert gate.main(["--save", str(saved)]) == 1
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main(["--accept-from", str(saved), "--reason", "CI's processor"]) == 0
    taken = {"reason": "CI's processor", "figures": FIGURES, "dearer": ["base"]}
    assert json.loads(file.read_text())["another machine"] == taken


def test_accepting_needs_a_reason_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "measure", lambda: pytest.fail("measured"))
    assert gate.main(["--accept"]) == 2


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_text()

    def full(self: Path, text: str) -> None:
        with self.open("w") as handle:
            handle.write(text[:10])
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="disk full"):
            gate.main(["--accept", "--reason", "again"])
    assert file.read_text() == before


def test_without_valgrind_structure_decides_and_a_line_says_why(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main([]) == 0
    assert "instructions: not counted: no valgrind" in capsys.readouterr().out
    monkeypatch.setattr(gate, "measure", lambda: with_peak(101))
    assert gate.main([]) == 1


def test_a_base_that_is_missing_is_said_by_default_and_an_error_when_asked_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions, "why_not", lambda: None)
    monkeypatch.setattr(instructions, "default_base", lambda: "no-such-revision")
    assert gate.main([]) == 0
    assert "instructions: not counted: revision='no-such-revision'" in capsys.readouterr().out
    assert gate.main(["--base", "no-such-revision"]) == 2
    assert "a shallow clone lacks older ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    "moved, code",
    [
        (row("base", 1_004_999), 0),
        (row("base", 1_005_001), 1),
        (row("base", 994_000), 0),
        (row("base", 1_000_000, dispatch=1000), 0),
        (row("base", 1_000_000, dispatch=1001), 1),
        (Row("base", Count(1, 1), None, "TypeError"), 1),
        (Row("base", None, Count(1, 1), "ImportError"), 0),
    ],
)
def test_more_instructions_than_the_margins_allow_fail_and_fewer_do_not(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moved: Row, code: int
) -> None:
    compared = Comparison("0" * 40, "AVX2", (moved, row("window", 1_000_000)))
    asked = counting(monkeypatch, compared, compared)
    capsys.readouterr()
    assert gate.main([]) == code
    assert asked == [(), ("base",)][: 1 + code]  # what is dearer is counted again, alone
    out = capsys.readouterr().out
    assert (str(moved) in out) == ("within" not in str(moved))


def test_instructions_that_are_dearer_only_once_have_no_verdict(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dearer, same = (Comparison("0" * 40, "AVX2", (row("base", found),)) for found in (2_000_000, 1_000_000))
    counting(monkeypatch, dearer, same)
    assert gate.main([]) == 4


def test_more_instructions_can_be_accepted_for_the_named_work_until_the_base_moves_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(file.read_text())
    dearer = Comparison("0" * 40, "AVX2", (row("base", 2_000_000), row("window", 1_000_000)))
    both = Comparison("0" * 40, "AVX2", (row("base", 2_000_000), row("window", 2_000_000)))
    counting(monkeypatch, dearer, dearer, both, both, dearer, dearer)
    assert gate.main(["--accept", "--reason", "a better norm"]) == 0
    monkeypatch.setattr(instructions, "json_at", lambda *_: before)
    assert gate.main([]) == 0
    assert "base was accepted since then: a better norm" in capsys.readouterr().out
    assert gate.main([]) == 1  # window was not named
    monkeypatch.setattr(instructions, "json_at", lambda *_: json.loads(file.read_text()))
    assert gate.main([]) == 1  # the base has the acceptance already: this rise is another


def test_the_worst_of_structure_and_instructions_decides(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dearer = Comparison("0" * 40, "AVX2", (row("base", 2_000_000),))
    counting(monkeypatch, *[dearer] * 4)
    monkeypatch.setattr(gate, "measure", lambda: with_peak(99))
    assert gate.main([]) == 1
    monkeypatch.setattr(gate, "key", lambda: "another machine")
    assert gate.main([]) == 1


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


def test_a_rise_is_not_made_up_for_by_a_saving(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "measure", lambda: {**with_peak(99), "plan_gpipe": {"bubble_slots": 37.0}})
    assert gate.main([]) == 1


def test_the_key_names_what_figures_depend_on() -> None:
    version, python, kernels, threads = gate.key().split(", ")
    assert version == f"torch {torch.__version__}"
    assert python == f"python {sys.version_info.major}.{sys.version_info.minor}"
    assert kernels == f"{cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}"
    assert threads == "1 thread"


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
    step = variants.train_step

    def wasteful(*built: Any) -> None:
        torch.empty(1)
        step(*built)

    monkeypatch.setattr(variants, "train_step", wasteful)
    changes = list(gate.differences(before, structure.measure_step(variants.base())))
    assert [change.where for change in changes] == ["allocations", "operators.aten.empty.memory_format"]
    assert all((change.found or 0) - (change.expected or 0) == 1 for change in changes)


def test_an_empty_tensor_more_in_a_training_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure.measure_step(variants.base())
    step = variants.train_step
    monkeypatch.setattr(variants, "train_step", lambda *built: (torch.empty(0), step(*built)))
    (change,) = gate.differences(before, structure.measure_step(variants.base()))  # no bytes: no allocation
    assert change.where == "operators.aten.empty.memory_format"


@pytest.mark.parametrize("decode", [False, True])
def test_serving_measures_the_same_twice(decode: bool) -> None:
    found = structure.measure_serving(variants.variant("per_head"), decode=decode)
    assert found == structure.measure_serving(variants.variant("per_head"), decode=decode)
    assert found["flops"] > 0


def test_decoding_works_on_one_token_and_prefill_on_all() -> None:
    prefill, decode = (structure.measure_serving(variants.base(), decode=decode) for decode in (False, True))
    assert decode["flops"] < prefill["flops"] / variants.LENGTH * 2


def test_a_waiting_host_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure.measure_step(variants.base())["host_synchronisations"]
    step = variants.train_step

    def waiting(state: Any, rows: torch.Tensor) -> None:
        step(state, rows)
        rows.sum().item()

    monkeypatch.setattr(variants, "train_step", waiting)
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


def test_every_kind_of_work_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure_step", "measure_serving", "measure_compiled"):
        monkeypatch.setattr(structure, name, lambda *_, **__: {})
    monkeypatch.setattr(structure, "measure_two_processes", lambda: {"two_processes": {}})
    monkeypatch.setattr(structure, "loss_of_rows", lambda _: ())
    measured = set(structure.measure())
    assert set(variants.works()) < measured
    assert measured - set(variants.works()) == {
        "compiled_base",
        "compiled_window",
        "drops",
        "two_processes",
        *(f"plan_{schedule.name}" for schedule in structure.SCHEDULES),
    }


def test_what_is_handed_to_a_collective_is_counted_in_bytes(tmp_path: Path) -> None:
    structure.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with structure.Operators() as ran:
            structure.distributed.all_reduce(torch.zeros(3))
    finally:
        structure.distributed.destroy_process_group()
    assert list(ran.sent.values()) == [12]
    assert [ran.counts[name] for name in ran.sent] == [1]


def test_no_two_variants_are_the_same_config() -> None:
    configs = variants.variants()
    assert len({digest(config) for config in configs.values()}) == len(configs)


def test_the_plans_idle_as_their_closed_forms_say() -> None:
    # GPipe and 1F1B: each of p ranks idles (p - 1) (f + b + w).
    plans = structure.measure_plans()
    idle = structure.PIPELINE_RANKS * (structure.PIPELINE_RANKS - 1) * 3.0
    assert plans["plan_gpipe"] == plans["plan_one_f_one_b"] == {"bubble_slots": idle}
