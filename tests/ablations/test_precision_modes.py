"""The study of precision: what a small cell of each kind measures, and the verdicts that its records give."""

import math
from dataclasses import replace
from typing import Any

import pytest

from ablations import precision_modes
from ablations.claims import Outcome, ledger
from ablations.evidence import NoEvidence
from ablations.precision_modes import REDUCED, STUDY, TRAINED, answer, cells, fastest_step, measure, overflow_share
from ablations.study import Cell, Reading
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record

QUICK = cells("quick")
OPERANDS = {"activation", "weight", "gradient"}


def values(readings: list[Reading], metric: str, **axes: Any) -> dict[str, float]:
    return {
        reading.arm: float(reading.measurement.value)
        for reading in readings
        if reading.measurement is not None and reading.measurement.metric == metric and reading.axes == axes
    }


@pytest.fixture(scope="module")
def trained() -> list[Reading]:
    cell = next(cell for cell in QUICK if cell.axes["look"] == "training")
    return measure(replace(cell, axes={**cell.axes, "steps": 2, "tokens": 64}))


def test_quick_has_two_seeds_and_full_what_the_rules_ask() -> None:
    assert {cell.seed for cell in QUICK} == {0, 1}
    assert len({cell.seed for cell in cells("full")}) >= max(rule.seeds for rule in STUDY.rules)
    assert {cell.axes["look"] for cell in QUICK} == {"training", "speed"}


def test_every_mode_is_trained_and_compared_with_fp32(trained: list[Reading]) -> None:
    assert not [reading for reading in trained if reading.failed or reading.pending]
    losses = values(trained, "loss")
    assert losses.keys() == TRAINED.keys()
    assert values(trained, "loss_gap") == {
        name: loss - losses["fp32"] for name, loss in losses.items() if name != "fp32"
    }
    assert values(trained, "skipped_steps") == dict.fromkeys(TRAINED, 0.0)
    # Two steps: rounding has moved the loss, but by far less than the loss itself.
    assert all(0 < abs(gap) < 0.05 for gap in values(trained, "loss_gap").values())


def test_operands_of_every_kind_are_counted_under_every_mode(trained: list[Reading]) -> None:
    for kind in OPERANDS:
        arms = {*REDUCED, "fp8_tensor"} | ({"fp16_unscaled", "fp8_floor"} if kind == "gradient" else set())
        for metric in ("sqnr", "overflow_share", "underflow_share", "small_value_error"):
            assert values(trained, metric, operand=kind).keys() == arms
        sqnr = values(trained, "sqnr", operand=kind)
        # Uniform rounding noise of a mantissa of m bits leaves about 6.02 m + 13.5 dB.
        assert sqnr["fp8"] == pytest.approx(31.5, abs=2)
        assert sqnr["bf16"] == pytest.approx(55.6, abs=2)
    assert values(trained, "overflow_share", operand="all").keys() == set(REDUCED)


def test_nothing_overflows_under_a_scale_per_tile(trained: list[Reading]) -> None:
    for kind in (*OPERANDS, "all"):
        shares = values(trained, "overflow_share", operand=kind)
        assert (shares["fp8"], shares["fp8_ue8m0"]) == (0.0, 0.0)


def test_loss_scaling_and_small_tiles_save_gradients_from_underflow(trained: list[Reading]) -> None:
    lost = values(trained, "underflow_share", operand="gradient")
    assert lost["fp16"] < lost["fp16_unscaled"]
    assert lost["fp8"] <= min(lost["fp8_tensor"], lost["fp8_floor"])


def test_a_speed_cell_times_real_formats_and_says_why_not_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_modes, "BLOCKS", 1)
    monkeypatch.setattr("bench.native.instruction_sets", lambda: ["avx512_bf16"])
    cell = Cell(
        arm=None, seed=0, axes={"look": "speed", "width": 128, "tokens": 256, "threads": 1}, seconds=1, device="cpu"
    )
    readings = measure(cell)
    assert values(readings, "step_cpu_ratio").keys() == {"bf16"}
    assert values(readings, "cpu_seconds").keys() == {"fp32", "bf16"}
    pending = {reading.arm: reading.pending for reading in readings if reading.pending}
    assert pending.keys() == {"fp16", "fp8", "fp8_ue8m0"}


def test_an_arm_whose_first_loss_is_off_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="bf16: first loss 8"):
        precision_modes._check({"fp32": lambda: 7.0, "bf16": lambda: 8.0})


def rows(arm: str, metric: str, found: list[float], **axes: Any) -> list[Record]:
    where = provenance("full")
    return [
        record(
            Point(study=STUDY.name, arm=arm, baseline="fp32", seed=seed, axes={"device": "cpu", **axes}),
            where,
            Measurement(metric=metric, value=value),
        )
        for seed, value in enumerate(found)
    ]


@pytest.mark.parametrize(
    "ratios, outcome",
    [([0.30, 0.31] * 3, Outcome.HOLDS), ([0.8, 0.9] * 3, Outcome.FAILS), ([0.3, 0.9] * 3, Outcome.UNDECIDABLE)],
)
def test_f1_is_the_inverse_of_the_fastest_real_mode_s_time(ratios: list[float], outcome: Outcome) -> None:
    found = rows("bf16", "step_cpu_ratio", ratios, width=384, threads=1)
    slower = rows("fp16", "step_cpu_ratio", [2.0] * 6, width=384, threads=1)
    verdict = fastest_step(ledger()["F1"], found + slower)
    assert verdict.outcome is outcome
    assert verdict.value == pytest.approx(math.exp(-sum(map(math.log, ratios)) / 6))
    assert "times as fast in bf16" in verdict.answer


def test_f1_without_a_timed_mode_has_no_evidence() -> None:
    with pytest.raises(NoEvidence, match="no reduced precision is real"):
        fastest_step(ledger()["F1"], rows("fp32", "loss", [1.0]))


@pytest.mark.parametrize(
    "shares, outcome", [([0.0] * 6, Outcome.HOLDS), ([0.01, 0.011] * 3, Outcome.FAILS), ([0.0, 0.01] * 3, None)]
)
def test_f2_is_the_share_that_overflows_in_fp16(shares: list[float], outcome: Outcome | None) -> None:
    records = rows("fp16", "overflow_share", shares, steps=100, operand="all")
    records += rows("fp8", "overflow_share", [0.0] * 6, steps=100, operand="all")
    records += rows("fp16", "skipped_steps", [0.0] * 6, steps=100)
    # A shorter run of the quick profile must not mix in.
    records += rows("fp16", "overflow_share", [0.5], steps=16, operand="all")
    verdict = overflow_share(ledger()["F2"], records)
    assert verdict.outcome is (outcome or Outcome.UNDECIDABLE)
    assert f"{100 * sum(shares) / 6:.2g}% overflow in fp16" in verdict.answer


def test_the_answer_carries_the_numbers_of_the_records() -> None:
    records = [row for name in (*REDUCED, "fp32_nudged") for row in rows(name, "loss_gap", [0.01, 0.03], steps=100)]
    for name in ("fp8", "fp8_floor", "fp8_tensor", "fp16", "fp16_unscaled"):
        records += rows(name, "underflow_share", [0.001, 0.003], steps=100, operand="gradient")
    said = answer(records)
    assert "After 100 steps" in said
    assert "bf16 0.02 [" in said
    assert "fp8 turns 0.2% to zero" in said
    assert "bf16 was not timed here" in said
    timed = answer(records + rows("bf16", "step_cpu_ratio", [0.5, 0.5], width=384, threads=1))
    assert "A bf16 step is 2 " in timed
