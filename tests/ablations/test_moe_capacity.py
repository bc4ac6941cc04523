"""The study of expert capacity: what a small cell measures, and the verdicts that its records give."""

from dataclasses import replace
from typing import Any

import pytest

from ablations import capacity_cells
from ablations.claims import Outcome, ledger
from ablations.moe_capacity import (
    BALANCES,
    CAPACITIES,
    CONFIGS,
    FACTORS,
    POLICED,
    POLICIES,
    STUDY,
    answer,
    cells,
    hours,
    keeps_capacity_without_waste,
    keeps_experts_from_overload,
    measure,
    named,
)
from ablations.study import Cell, Reading
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.config import Dropless
from reports.figures import draw

LIMITED = set(CAPACITIES) - {"dropless"}
FACTORED = LIMITED - set(POLICIES)


def values(readings: list[Reading], metric: str, **axes: Any) -> dict[str, float]:
    return {
        reading.arm: float(reading.measurement.value)
        for reading in readings
        if reading.measurement is not None and reading.measurement.metric == metric and reading.axes == axes
    }


def small(part: str) -> Cell:
    """A cell of the quick profile, smaller yet."""
    (cell,) = [cell for cell in cells("quick") if cell.axes["part"] == part and cell.seed == 0]
    return replace(cell, axes={**cell.axes, "steps": 2, "tokens": 256})


@pytest.fixture(scope="module")
def trained() -> list[Reading]:
    return measure(small("training"))


@pytest.fixture(scope="module")
def timed() -> list[Reading]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity_cells, "PAST", 2)
        return measure(small("timing"))


def test_quick_has_two_seeds_and_full_what_the_rules_ask() -> None:
    assert {cell.seed for cell in cells("quick")} == {0, 1}
    assert len({cell.seed for cell in cells("full")}) >= max(rule.seeds for rule in STUDY.rules)
    assert {arm.name for arm in STUDY.arms} == CONFIGS.keys()


def test_full_cells_last_a_minute_at_most_and_the_page_says_what_they_add_up_to() -> None:
    full = cells("full")
    assert max(cell.seconds for cell in full) <= 60
    assert {cell.arm for cell in full if not cell.timed} == CONFIGS.keys()
    assert [cell.arm for cell in full if cell.timed] == [None] * 6
    assert any(f"{hours():.1f} hours" in said for said in STUDY.limits)


def test_one_thing_changes_at_a_time() -> None:
    assert set(POLICIES) == {named(factor, policy) for factor in POLICED for policy in ("position", "reroute")}
    for name, config in CONFIGS.items():
        assert config.model.moe is not None
        assert isinstance(config.model.moe.capacity, Dropless) == (name == "dropless" or name in BALANCES)
        assert (config.model.moe.balance == CONFIGS["dropless"].model.moe.balance) == (name not in BALANCES)


def test_every_arm_is_trained_and_has_its_routing_early_and_late(trained: list[Reading]) -> None:
    assert values(trained, "loss").keys() == CONFIGS.keys()
    for when in ("early", "late"):
        assert values(trained, "max_vio", routing=when).keys() == CONFIGS.keys()
        for metric in ("drop_share", "refused_share", "drop_floor", "empty_slot_share", "capacity_factor"):
            assert values(trained, metric, routing=when).keys() == LIMITED


def test_early_on_the_same_weights_more_capacity_drops_less_and_leaves_more_empty(trained: list[Reading]) -> None:
    dropped, empty = (values(trained, metric, routing="early") for metric in ("drop_share", "empty_slot_share"))
    drops = [dropped[named(factor)] for factor in FACTORS]
    assert drops == sorted(drops, reverse=True)
    empties = [empty[named(factor)] for factor in FACTORS]
    assert empties == sorted(empties)
    # 256 tokens x 2 on 128 experts: 4 slots at factor 1, so every assignment dropped is a slot left empty.
    assert dropped["factor_1"] == pytest.approx(empty["factor_1"])
    assert dropped["adaptive"] == 0.0, "the first step has no past"


def test_early_on_the_same_weights_all_policies_refuse_alike_and_none_is_what_dropless_would(
    trained: list[Reading],
) -> None:
    refused, dropped = (values(trained, metric, routing="early") for metric in ("refused_share", "drop_share"))
    for factor in FACTORS:
        would = values(trained, "refused_share", routing="early", factor=factor)
        assert would.keys() == {"dropless", *BALANCES}
        # Alike, not equal: what the first layer drops, the second does not see.
        assert would["dropless"] == pytest.approx(refused[named(factor)], abs=0.02)
        assert dropped[named(factor)] == refused[named(factor)]
    for factor in POLICED:
        position, reroute = named(factor, "position"), named(factor, "reroute")
        assert refused[position] == pytest.approx(refused[named(factor)], abs=0.02)
        assert refused[reroute] == pytest.approx(refused[named(factor)], abs=0.02)
        assert dropped[position] == refused[position]
        assert dropped[reroute] < 0.01 < refused[reroute]


def test_in_perfect_balance_nothing_drops_and_slots_stay_empty_by_the_factor(timed: list[Reading]) -> None:
    assert set(values(timed, "drop_share", routing="balanced").values()) == {0.0}
    empty = values(timed, "empty_slot_share", routing="balanced")
    assert empty["factor_1"] == empty["adaptive"] == 0.0
    assert empty["factor_1.2"] == pytest.approx(1 - 4 / 5)
    assert empty["factor_2"] == pytest.approx(1 / 2)


def test_capacities_are_timed_against_dropless_and_against_forced_balance(timed: list[Reading]) -> None:
    assert values(timed, "step_cpu_ratio", routing="late").keys() == LIMITED
    for routing in ("early", "balanced"):
        assert values(timed, "step_cpu_ratio", routing=routing).keys() == FACTORED
    for routing in ("early", "late"):
        assert values(timed, "routing_cpu_ratio", routing=routing).keys() == FACTORED | {"dropless"}
    saved = values(timed, "saved_bytes", routing="late")
    assert saved.keys() == CAPACITIES.keys()
    assert saved["factor_1"] < saved["factor_2"] < saved["dropless"]
    # An average of two batches still differs from a third: what follows the past keeps all but a few rows.
    assert saved["factor_2"] < saved["adaptive"] <= saved["dropless"]


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


@pytest.fixture
def full() -> list[Record]:
    """Records of the full size, as far as the answer and the page of curves need them."""
    records = []
    for arm in sorted(LIMITED):
        records += late(arm, "drop_share", [0.25] * 2) + late(arm, "refused_share", [0.5] * 2)
        records += late(arm, "drop_floor", [0.02] * 2) + late(arm, "capacity_factor", [3.0] * 2)
        for routing in ("early", "late", "balanced"):
            records += rows(arm, "step_cpu_ratio", [0.9, 0.9], steps=120, routing=routing)
            records += rows(arm, "saved_bytes", [3e6] * 2, steps=120, routing=routing)
            records += rows(arm, "tokens_per_second", [1.5e4, 1.6e4], steps=120, routing=routing)
        records += late(arm, "routing_cpu_ratio", [1.25] * 2)
        records += rows(arm, "loss", [4.01, 4.03], steps=120)
    for factor in FACTORS:
        records += rows("dropless", "refused_share", [0.75] * 2, steps=120, routing="late", factor=factor)
    records += rows("dropless", "loss", [4.0, 4.0], steps=120)
    return records + late("dropless", "routing_cpu_ratio", [1.5] * 2)


def test_the_answer_carries_the_numbers_of_the_records(full: list[Record]) -> None:
    said = answer(full)
    assert "Late in 120 steps full experts drop 25% (chance 2%) at factor 1, 25%" in said
    assert "by 0.02 [-0.107, 0.147] at factor 1, 0.02" in said
    assert "where 50% are refused and 25% find no room; of dropless routing 75% would be refused" in said
    assert "is 3 times the mean load" in said
    assert "takes 0.9 of dropless' CPU time late, 0.9 early" in said
    assert "takes 1.5 times what it takes in forced balance, a step at factor 1.2 1.25 times" in said


def test_the_page_of_curves_has_every_quantity_with_its_intervals(full: list[Record]) -> None:
    (figure,) = [figure for figure in STUDY.figures if figure.name == "curves"]
    picture, tables = draw(STUDY, figure, full)
    titles = ["Quality", "Drops", "Time", "Speed", "Memory"]
    assert [axes.get_title(loc="left") for axes in picture.axes] == [*titles, ""], "the last has the legend"
    quality = picture.axes[0]
    least = next(line for line in quality.lines if line.get_label() == "least probable dropped")
    assert list(least.get_xdata()) == list(FACTORS)
    assert list(least.get_ydata()) == pytest.approx([0.02] * len(FACTORS)), "paired with dropless"
    assert len(quality.containers) == 4, "intervals of three policies and of the star"
    star = next(line for line in quality.lines if line.get_marker() == "*")
    assert list(star.get_xdata()) == [3.0]
    assert "drops by chance (floor)" in [line.get_label() for line in picture.axes[1].lines]
    late = next(line for line in picture.axes[3].lines if line.get_label() == "late routing")
    assert list(late.get_ydata()) == pytest.approx([1.55e4] * len(FACTORS)), "tokens per second"
    assert len(picture.axes[3].collections) == 4, "bands of three routings, and the interval of the star"
    assert [table.caption for table in tables] == titles


def test_without_records_the_page_of_curves_says_what_is_missing() -> None:
    (figure,) = [figure for figure in STUDY.figures if figure.name == "curves"]
    assert draw(STUDY, figure, late("dropless", "loss", [1.0]))[1] == []
