"""The study of recovery: one start for all methods, censored trainings without a number, its sentence and pictures."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ablations import moe_recovery
from ablations.balance_methods import ASKED, EXACT, STRENGTHS, TRIED, ends
from ablations.evidence import NoEvidence
from ablations.moe_balance_answer import COMPARISONS
from ablations.moe_recovery import COLLAPSED, EXPERTS, LAYERS, STUDY, K, cells, figures, measure
from ablations.moe_recovery_answer import BASELINE, answer
from ablations.moe_recovery_pictures import PANELS, curves, steps
from ablations.study import Cell, Reading
from ablations.traced import Prose
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.metrics import RECOVERED
from bench.record import Record
from dsv3.config import QuantileBias
from dsv3.moe.load import max_vio_floor
from reports import twins
from reports.frame import summary

WHERE = provenance("full")
WATCHED = 100
TOKENS = 1024


def kept(arm: str, seed: int, metric: str, value: float, **axes: Any) -> Record:
    at = {"device": "cpu", "trained": 200, "watched": WATCHED, "rows": 64}
    point = Point(study="moe_recovery", arm=arm, baseline=BASELINE, seed=seed, axes={**at, **axes})
    return record(point, WHERE, Measurement(metric=metric, value=value))


def method(
    arm: str, after: list[float | None], *, strength: str = "default", dead: float = 0.0, loss: float = 4.0
) -> list[Record]:
    """A training a seed that recovers after so many updates, or never; its excess falls to 1.4 there, else to 9."""
    found = []
    for seed, update in enumerate(after):
        at = {"strength": strength}
        found.append(kept(arm, seed, "recovered_share", float(update is not None), **at))
        if update is not None:
            found.append(kept(arm, seed, "recovery_steps", update, **at))
        for looked in (0, ASKED, WATCHED):
            excess = 1.4 if update is not None and looked >= update else 9.0 + 0.1 * seed
            found.append(kept(arm, seed, "excess_max_vio", excess if looked else 45.0, updates=looked, **at))
            found.append(kept(arm, seed, "max_vio", 20.0 if looked == 0 else 3.0, updates=looked, **at))
            found.append(kept(arm, seed, "dead_experts", dead, updates=looked, **at))
        found.append(kept(arm, seed, "loss", loss + 0.01 * seed, **at))
    return found


def records() -> list[Record]:
    """The exact quantile in time, the histogram in time but for one seed, the bias in half of the trainings, the rest
    never.
    """
    found = method("quantile_exact", [4, 5, 6, 4, 5, 6], loss=3.98)
    found += method("quantile", [4, 5, 6, 4, 5, 12])
    found += method("sign_bias", [40, None, 50, None, 60, None], strength="rate 0.03")
    found += method("expert_choice", [1, 1, 1, 1, 1, 1])
    found += method(BASELINE, [None] * 6) + method("similarity", [None] * 6, dead=2.5)
    for seed in range(6):
        found += [
            kept(BASELINE, seed, "excess_max_vio", 1.6, router="healthy"),
            kept(BASELINE, seed, "excess_over_blocks", 1.7, router="healthy"),
            kept(BASELINE, seed, "score_offset", 0.25, router="collapsed"),
        ]
    return found


@pytest.fixture(scope="module")
def cell() -> Cell:
    (quick,) = cells("quick")
    return quick


@pytest.fixture(scope="module")
def measured(cell: Cell) -> list[Reading]:
    few = {arm: {"default": TRIED[arm]["default"]} for arm in (BASELINE, "quantile_exact", "expert_choice")}
    few["switch"] = dict(TRIED["switch"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_recovery, "TRIED", few)
        patch.setattr(moe_recovery, "HELD_OUT", 64)
        return measure(cell)


def values(readings: list[Reading], metric: str, **axes: Any) -> dict[tuple[str, Any], float]:
    return {
        (one.arm, one.axes.get("strength")): one.measurement.value
        for one in readings
        if one.measurement and one.measurement.metric == metric and axes.items() <= one.axes.items()
    }


def loads(*violations: float) -> list[torch.Tensor]:
    """Batches whose busiest expert, in each layer, is so many times chance above the mean; others share the rest."""
    mean = TOKENS * K / EXPERTS
    found = []
    for violation in violations:
        most = round(mean * (1 + violation * max_vio_floor(EXPERTS, K, TOKENS)))
        others, left = divmod(TOKENS * K - most, EXPERTS - 1)
        layer = [most, *[others + 1] * left, *[others] * (EXPERTS - 1 - left)]
        found.append(torch.tensor([layer] * LAYERS))
    return found


def test_every_method_is_tried_at_its_default_and_its_strongest_and_the_exact_quantile_beside() -> None:
    assert list(TRIED) == [*STRENGTHS, "quantile_exact"] == [arm.name for arm in STUDY.arms]
    for arm, strengths in STRENGTHS.items():
        assert {"default", list(strengths)[-1]} <= TRIED[arm].keys()
        assert TRIED[arm].items() <= strengths.items()
    assert list(TRIED["quantile"]) == ["momentum 0.5", "default"]
    assert ends({"default": (), "alpha 1": ()}) == {"default": (), "alpha 1": ()}
    for strength, (exact,) in EXACT.items():
        (histogram,) = TRIED["quantile"][strength]
        assert isinstance(histogram, QuantileBias)
        assert exact == replace(histogram, bins=None)


def test_the_family_of_moe_balance_is_as_declared() -> None:
    assert COMPARISONS == len(STRENGTHS) - 1 == 12


def test_all_methods_go_on_from_one_collapse(measured: list[Reading]) -> None:
    starts = values(measured, "max_vio", updates=0)
    assert len(starts) == 5
    assert COLLAPSED <= min(starts.values()) == max(starts.values()) < COLLAPSED + 0.1
    assert len(set(values(measured, "excess_max_vio", updates=0).values())) == 1
    after = values(measured, "excess_max_vio", updates=2)
    assert after["quantile_exact", "default"] < after["expert_choice", "default"]
    (offset,) = values(measured, "score_offset").values()
    assert 0 < offset < 1
    assert values(measured, "excess_max_vio", router="healthy").keys() == {(BASELINE, None)}


def test_readings_are_of_the_metrics_that_are_declared(measured: list[Reading], cell: Cell) -> None:
    assert {one.measurement.metric for one in measured if one.measurement} == set(STUDY.metrics) - {"recovery_steps"}
    assert set(values(measured, "recovered_share").values()) == {0.0}
    updates = {one.axes["updates"] for one in measured if "updates" in one.axes}
    assert updates == set(range(int(cell.axes["watched"]) + 1))


def test_a_method_leaves_the_state_that_others_go_on_from(cell: Cell, measured: list[Reading]) -> None:
    """The strengths of the Switch loss are the last of all: the first of them starts where the baseline did."""
    starts = values(measured, "excess_max_vio", updates=0)
    assert starts["switch", "default"] == starts["switch", "alpha 1"] == starts[BASELINE, "default"]
    losses = values(measured, "loss")
    assert losses["switch", "default"] != losses["switch", "alpha 1"]


def test_a_training_that_diverges_is_a_failure_of_its_arm(monkeypatch: pytest.MonkeyPatch, cell: Cell) -> None:
    def diverges(*_: Any) -> None:
        raise FloatingPointError("step 1: loss is not finite")

    monkeypatch.setattr("bench.collapsed_routing.watched", diverges)
    monkeypatch.setattr(moe_recovery, "TRIED", {"quantile": {"default": TRIED["quantile"]["default"]}})
    monkeypatch.setattr(moe_recovery, "HELD_OUT", 64)
    *start, share, reading = measure(cell)
    assert (reading.arm, reading.failed) == ("quantile", "step 1: loss is not finite")
    assert share.measurement is not None
    assert (share.arm, share.measurement.metric, share.measurement.value) == ("quantile", "recovered_share", 0.0)
    assert all(one.arm == BASELINE for one in start)


def test_recovery_is_the_first_batch_at_the_border_and_censored_without_a_number() -> None:
    found = figures(loads(40.0, 3.0, RECOVERED - 0.05, 2.0))
    assert ({}, {"recovered_share": 1.0}) in found
    assert ({}, {"recovery_steps": 2}) in found
    never = [name for _, point in figures(loads(40.0, 3.0, 2.0)) for name in point]
    assert "recovery_steps" not in never
    assert ({}, {"recovered_share": 0.0}) in figures(loads(40.0, 3.0, 2.0))


def test_the_answer_says_who_is_in_time_later_in_part_and_never() -> None:
    said = Prose.of(answer(records()))
    assert "by 1.6 times what chance gives, and by 1.7 times what an even router's would" in said
    assert "were collapsed to MaxVio 20, 45 times chance." in said
    in_time, rest = said.split("as asked, all trainings with ")[1].split("; all, but some later, with ")
    assert in_time.startswith("expert_choice (1), quantile_exact (5 [4.06, 5.94])")
    later, rest = rest.split("; a part, within 100 updates, with ")
    assert later == "quantile (6 [2.82, 9.18])"
    part, never = rest.split("; no training, in 100 updates, with ")
    assert part.startswith("sign_bias at rate 0.03 (50 [")
    assert never.startswith(f"similarity, {BASELINE}.")


def test_a_method_that_looks_ahead_is_not_the_best() -> None:
    said = Prose.of(answer(records()))
    assert "first out of the causal ones is quantile_exact, at 1.4 times chance after 10 updates" in said
    assert "Updates of others less its own, the smallest of several means, which flatters it: quantile 1 [-1.57" in said
    assert "after 100 updates, less that of deepseek_v3, is -0.02 [-0.02, -0.02] nat/token" in said


def test_what_the_published_rate_has_to_make_up_for_is_said_from_figures() -> None:
    said = Prose.of(answer(records()))
    assert "raised the scores of its experts by 0.25 in the mean" in said
    assert "falls by 0.001 an update there and rises as much elsewhere needs 125 updates" in said


def test_experts_that_die_are_named() -> None:
    said = Prose.of(answer(records()))
    assert (
        "After 100 updates one expert a layer or more, in the mean, has no token in a batch with similarity (2.5)."
        in said
    )
    alive = [row for row in records() if row.arm != "similarity"]
    assert "After 100 updates no method leaves one expert a layer" in Prose.of(answer(alive))


def test_without_records_there_is_no_answer_and_no_picture() -> None:
    with pytest.raises(NoEvidence):
        answer([])
    for draw in (curves, steps):
        with pytest.raises(LookupError):  # where no record has an axis, a KeyError
            draw(summary([kept(BASELINE, 0, "loss", 4.0, strength="default")]))


def test_every_method_has_a_place_in_the_curves() -> None:
    assert sorted(arm for arms in PANELS.values() for arm in arms) == sorted(TRIED)
    picture = curves(summary(records()))
    tables = twins.of_picture(picture, "curves")
    assert [table.caption for table in tables] == [title for title in PANELS if title != "A loss on loads"]
    assert tables[1].head[1:] == ("quantile_exact", "quantile")
    assert [row[0] for row in tables[1].rows] == ["0", "10", "100"]


def test_bars_reach_to_the_last_look_where_not_all_recover() -> None:
    (table,) = twins.of_picture(steps(summary(records())), "steps")
    assert dict(table.rows) == {
        "expert_choice": "all recovered (0 to 1)",
        "quantile_exact": "all recovered (0 to 5)",
        "quantile": "all recovered (0 to 6)",
        "sign_bias, rate 0.03": "50% within 100 (0 to 100)",
        "similarity": "not within 100 (0 to 100)",
        BASELINE: "not within 100 (0 to 100)",
    }
