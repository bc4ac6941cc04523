"""The study of expert capacity: what a small cell measures, and the verdicts that its records give."""

from dataclasses import replace
from typing import Any

import pytest

from ablations import moe_capacity
from ablations.claims import Outcome, ledger
from ablations.moe_capacity import (
    BALANCES,
    CONFIGS,
    FACTORS,
    STUDY,
    TIMED,
    answer,
    cells,
    keeps_capacity_without_waste,
    keeps_experts_from_overload,
    measure,
    named,
)
from ablations.study import Reading
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record

LIMITED = {named(factor) for factor in FACTORS}


def values(readings: list[Reading], metric: str, **axes: Any) -> dict[str, float]:
    return {
        reading.arm: float(reading.measurement.value)
        for reading in readings
        if reading.measurement is not None and reading.measurement.metric == metric and reading.axes == axes
    }


@pytest.fixture(scope="module")
def measured() -> list[Reading]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_capacity, "BLOCKS", 1)
        patch.setattr(moe_capacity, "HELD_OUT", 2)
        cell = cells("quick")[0]
        return measure(replace(cell, axes={"steps": 2, "tokens": 256}))


def test_quick_has_two_seeds_and_full_what_the_rules_ask() -> None:
    assert {cell.seed for cell in cells("quick")} == {0, 1}
    assert len(cells("full")) >= max(rule.seeds for rule in STUDY.rules)
    assert {arm.name for arm in STUDY.arms} == CONFIGS.keys()


def test_every_arm_is_trained_and_compared_with_dropless(measured: list[Reading]) -> None:
    losses = values(measured, "loss")
    assert losses.keys() == CONFIGS.keys()
    assert values(measured, "loss_gap") == {
        name: loss - losses["dropless"] for name, loss in losses.items() if name != "dropless"
    }
    for when in ("early", "late"):
        assert values(measured, "max_vio", routing=when).keys() == CONFIGS.keys()
        assert values(measured, "drop_share", routing=when).keys() == LIMITED


def test_early_on_the_same_weights_more_capacity_drops_less_and_leaves_more_empty(measured: list[Reading]) -> None:
    dropped, empty = (values(measured, metric, routing="early") for metric in ("drop_share", "empty_slot_share"))
    assert [dropped[named(factor)] for factor in FACTORS] == sorted(dropped.values(), reverse=True)
    assert [empty[named(factor)] for factor in FACTORS] == sorted(empty.values())
    # 256 tokens x 2 on 128 experts: 4 slots at factor 1, so every assignment dropped is a slot left empty.
    assert dropped["factor_1"] == pytest.approx(empty["factor_1"])


def test_in_perfect_balance_nothing_drops_and_slots_stay_empty_by_the_factor(measured: list[Reading]) -> None:
    assert set(values(measured, "drop_share", routing="balanced").values()) == {0.0}
    empty = values(measured, "empty_slot_share", routing="balanced")
    assert empty["factor_1"] == 0.0
    assert empty["factor_1.2"] == pytest.approx(1 - 4 / 5)
    assert empty["factor_2"] == pytest.approx(1 / 2)


def test_capacity_arms_are_timed_against_dropless_under_both_routings(measured: list[Reading]) -> None:
    for routing in ("late", "balanced"):
        assert values(measured, "step_cpu_ratio", routing=routing).keys() == LIMITED
        assert values(measured, "saved_bytes", routing=routing).keys() == set(TIMED)
    saved = values(measured, "saved_bytes", routing="late")
    assert saved["factor_1"] < saved["dropless"]


def rows(arm: str, metric: str, found: list[float], **axes: Any) -> list[Record]:
    where = provenance("full")
    return [
        record(
            Point(study=STUDY.name, arm=arm, baseline="dropless", seed=seed, axes={"device": "cpu", **axes}),
            where,
            Measurement(metric=metric, value=value),
        )
        for seed, value in enumerate(found)
    ]


def late(arm: str, metric: str, found: list[float]) -> list[Record]:
    return rows(arm, metric, found, steps=120, routing="late")


@pytest.mark.parametrize(
    "with_loss, without, outcome",
    [
        ([1.1, 1.2] * 3, [9.0, 8.0] * 3, Outcome.HOLDS),
        ([30.0, 31.0] * 3, [30.0, 33.0] * 3, Outcome.FAILS),
        ([1.0, 30.0] * 3, [30.0, 33.0] * 3, Outcome.UNDECIDABLE),
        ([1.1, 1.2] * 3, [1.2, 1.1] * 3, Outcome.UNDECIDABLE),  # nothing to prevent
    ],
)
def test_b1_asks_whether_the_busiest_expert_exceeds_chance(
    with_loss: list[float], without: list[float], outcome: Outcome
) -> None:
    records = late("dropless", "excess_max_vio", with_loss) + late("no_loss", "excess_max_vio", without)
    for name in BALANCES.keys() - {"no_loss"}:
        records += late(name, "excess_max_vio", [2.0] * 6)
    assert keeps_experts_from_overload(ledger()["B1"], records).outcome is outcome


@pytest.mark.parametrize(
    "dropped, empty, outcome",
    [
        ([0.0] * 6, [0.005] * 6, Outcome.HOLDS),
        ([0.0] * 6, [0.16, 0.17] * 3, Outcome.FAILS),
        ([0.5, 0.6] * 3, [0.005] * 6, Outcome.FAILS),
        ([0.0] * 6, [0.001, 0.03] * 3, Outcome.UNDECIDABLE),
    ],
)
def test_b2_fails_by_dropped_assignments_or_by_empty_slots(
    dropped: list[float], empty: list[float], outcome: Outcome
) -> None:
    records = late("factor_1.2", "drop_share", dropped) + late("factor_1.2", "empty_slot_share", empty)
    records += late("factor_1.2", "drop_floor", [0.0] * 6)
    assert keeps_capacity_without_waste(ledger()["B2"], records).outcome is outcome


def test_the_answer_carries_the_numbers_of_the_records() -> None:
    records = [
        row for arm in LIMITED for row in late(arm, "drop_share", [0.25] * 2) + late(arm, "drop_floor", [0.02] * 2)
    ]
    records += rows("factor_1.2", "loss_gap", [0.01, 0.03], steps=120)
    records += late("factor_1.2", "step_cpu_ratio", [0.9, 0.9])
    records += rows("factor_1.2", "step_cpu_ratio", [1.1, 1.1], steps=120, routing="balanced")
    said = answer(records)
    assert "late in 120 steps" in said
    assert "1.2: 25% (chance 2%)" in said
    assert "by 0.02 [" in said
    assert "to 1.1 " in said
