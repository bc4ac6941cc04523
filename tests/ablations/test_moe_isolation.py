"""The study of gradient paths: what a small cell measures, and the verdicts that its records give."""

from dataclasses import replace
from typing import Any

import pytest

from ablations import moe_isolation
from ablations.claims import Outcome, ledger
from ablations.comparison import families
from ablations.evidence import NoEvidence
from ablations.moe_isolation import (
    BASELINE,
    CONFIGS,
    DETACHED,
    LOOKS,
    ONE,
    STUDY,
    TWO,
    agreement_over_training,
    answer,
    cells,
    core_minutes,
    measure,
    paths,
    reduces_conflicts,
    sized,
)
from ablations.study import Reading
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.config import digest
from reports.frame import summary

ARMS = (BASELINE, "router_detached", "clip_experts")


def values(readings: list[Reading], metric: str, **axes: Any) -> dict[str, float]:
    return {
        reading.arm: float(reading.measurement.value)
        for reading in readings
        if reading.measurement is not None and reading.measurement.metric == metric and reading.axes == axes
    }


@pytest.fixture(scope="module")
def measured() -> list[Reading]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_isolation, "CONFIGS", {arm: CONFIGS[arm] for arm in ARMS})
        patch.setattr(moe_isolation, "LOOKS", {2: (0.0, 1.0)})
        return measure(replace(cells("quick")[0], axes={"steps": 1, "tokens": 256, "looks": 2}))


def test_full_has_the_seeds_of_the_rule_in_cells_of_at_most_a_minute_and_half_an_hour_in_all() -> None:
    full = cells("full")
    for arm in CONFIGS:
        assert len({cell.seed for cell in full if cell.arm == arm}) == STUDY.seeds["full"] == STUDY.rules[0].seeds
    assert max(cell.seconds for cell in full) <= 60
    assert core_minutes("full") <= 30
    assert {arm.name for arm in STUDY.arms} == CONFIGS.keys()


def test_what_is_kept_off_the_router_differs_in_its_paths_and_not_in_its_config() -> None:
    assert {digest(CONFIGS[arm]) for arm in DETACHED} == {digest(CONFIGS[BASELINE])}
    assert [paths(arm).detached for arm in (BASELINE, *DETACHED)] == [None, "balance", "language"]


def test_all_experts_of_a_layer_may_have_the_norm_that_the_other_arm_gives_to_everything() -> None:
    apart, moe = paths("clip_experts"), CONFIGS["clip_experts"].model.moe
    assert apart.experts is not None
    assert moe is not None
    together = apart.experts * moe.n_routed_experts**0.5
    assert together == pytest.approx(apart.others) == pytest.approx(CONFIGS["clip_global"].train.clip_grad_norm)
    assert paths("clip_global").experts is None


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_looks_fall_on_steps_of_their_own(profile: Any) -> None:
    cell = cells(profile)[0]
    steps = sized(BASELINE, cell).train.steps
    shares = LOOKS[int(cell.axes["looks"])]
    assert len({round(share * steps) for share in shares}) == len(shares)
    assert {0.1, 1.0} <= set(shares)


def test_before_the_first_step_only_what_the_path_itself_changes_differs(measured: list[Reading]) -> None:
    for metric in ("router_cosine", "router_pull"):
        found = values(measured, metric, done=0.0)
        assert found.keys() == set(ARMS)
        assert len(set(found.values())) == 1
    found = values(measured, "gradient_cosine", done=0.0, texts=TWO)
    assert found[BASELINE] == found["clip_experts"]
    assert found[BASELINE] != found["router_detached"]


def test_batches_of_one_domain_agree_more_than_those_of_two(measured: list[Reading]) -> None:
    one, two = (values(measured, "gradient_cosine", done=1.0, texts=texts) for texts in (ONE, TWO))
    assert all(one[arm] > two[arm] for arm in ARMS)
    one, two = (values(measured, "conflict_share", done=1.0, texts=texts) for texts in (ONE, TWO))
    assert all(0 <= one[arm] < two[arm] < 1 for arm in ARMS)


def test_every_arm_has_a_loss_and_the_layer_has_no_gradient_across_experts(measured: list[Reading]) -> None:
    for metric in ("loss", "max_vio", "clipped_share"):
        assert values(measured, metric).keys() == set(ARMS)
    assert values(measured, "cross_expert_gradient") == {BASELINE: 0.0}


def rows(arm: str, metric: str, found: list[float], **axes: Any) -> list[Record]:
    where = provenance("full")
    return [
        record(
            Point(
                study=STUDY.name, arm=arm, baseline=BASELINE, seed=seed, axes={"device": "cpu", "steps": 100, **axes}
            ),
            where,
            Measurement(metric=metric, value=value),
        )
        for seed, value in enumerate(found)
    ]


def late(arm: str, metric: str, found: list[float], **axes: Any) -> list[Record]:
    return rows(arm, metric, found, done=1.0, **axes)


@pytest.mark.parametrize(
    "without_balance, without_language, outcome",
    [
        ([0.1, 0.11] * 3, [0.1, 0.11] * 3, Outcome.FAILS),
        ([0.1, 0.11] * 3, [0.2, 0.21] * 3, Outcome.HOLDS),
        ([0.2, 0.21] * 3, [0.0, 0.01] * 3, Outcome.HOLDS),
        ([0.1, 0.11] * 3, [0.0, 0.3] * 3, Outcome.UNDECIDABLE),
        ([0.0, 0.3] * 3, [0.1, 0.11] * 3, Outcome.UNDECIDABLE),
    ],
)
def test_b3_holds_where_either_loss_kept_off_the_router_raises_the_cosine_by_the_margin(
    without_balance: list[float], without_language: list[float], outcome: Outcome
) -> None:
    records = late(BASELINE, "gradient_cosine", [0.1, 0.11] * 3, texts=TWO)
    records += late(BASELINE, "gradient_cosine", [0.5, 0.6] * 3, texts=ONE)
    for arm, found in zip((*DETACHED, "sign_bias"), (without_balance, without_language, [0.9] * 6), strict=True):
        records += late(arm, "gradient_cosine", found, texts=TWO)
    assert reduces_conflicts(ledger()["B3"], records).outcome is outcome


def told() -> list[Record]:
    records = late(BASELINE, "conflict_share", [0.3, 0.3], texts=TWO)
    records += late(BASELINE, "conflict_share", [0.05, 0.05], texts=ONE)
    records += rows(BASELINE, "cross_expert_gradient", [0.0, 0.0])
    for done in (0.1, 1.0):
        records += rows(BASELINE, "router_pull", [0.001, 0.003], done=done)
        records += rows(BASELINE, "router_cosine", [-0.2, 0.0], done=done)
    for arm in CONFIGS:
        records += rows(arm, "loss", [5.0, 5.0] if arm == BASELINE else [5.5, 5.3])
    return records


def test_the_answer_carries_the_numbers_of_the_records() -> None:
    said = answer(told())
    assert "is 0.002 [" in said
    assert "in a share 0.3 of the experts, two batches of one domain in 0.05" in said
    assert "weights is 0." in said
    assert "clip_experts 0.4 [" in said


def test_clipping_by_expert_is_set_against_clipping_by_one_norm_as_tight() -> None:
    records = [row for row in told() if row.arm != "clip_experts"]
    records += rows("clip_experts", "loss", [5.25, 5.45])
    assert "instead of all by one norm as tight changes it by -0.05 [" in answer(records)
    family = families(records, STUDY.compared, arms=list(CONFIGS), baseline=BASELINE, seeds=2)[-1]
    assert (family.baseline, family.arms) == ("clip_global", ("clip_experts",))
    assert family.compared.margin == STUDY.compared[0].margin


def test_the_picture_has_a_line_for_each_arm_in_a_panel_for_cosine_and_one_for_norm() -> None:
    picture = agreement_over_training(summary(told()))
    for axes, values in zip(picture.axes, ([-0.1, -0.1], [0.002, 0.002]), strict=True):
        (line,) = (line for line in axes.lines if line.get_label() == BASELINE)
        assert list(line.get_xdata()) == [0.1, 1.0]
        assert list(line.get_ydata()) == pytest.approx(values)
    assert picture.axes[1].get_yscale() == "log"
    with pytest.raises(NoEvidence, match="no look at the router yet"):
        agreement_over_training(summary(rows(BASELINE, "loss", [5.0])))
