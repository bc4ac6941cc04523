"""Every arm against the baseline: what the two families of tests say, and how often they say it for nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from ablations.comparison import Compared, Comparison, Family, families
from ablations.evidence import Estimate
from ablations.significance import equivalence, holm_adjusted, paired_t
from ablations.study import Study
from bench.record import Record

LOSS = Compared("loss", margin=0.1, why="a tenth is nothing here")
SPREAD = (-0.02, 0.01, 0.03, -0.01, 0.0, 0.02)


def row(arm: str, seed: int, value: float | None, **axes: str | int) -> Record:
    known = {"study": "s", "metric": "loss", "unit": "nat/token", "machine": "m", "revision": "r", "profile": "full"}
    lost = {"n": 0, "error": "lost"} if value is None else {"n": 1}
    return Record(**known, arm=arm, seed=seed, noise="absolute", value=value, time="t", axes=axes, **lost)  # type: ignore[arg-type]


def rows(effects: Mapping[str, float], seeds: int = 6, **axes: str | int) -> list[Record]:
    """Arms whose seeds share a large part and differ by the effect and a little of their own."""
    found = [row("base", seed, 5.0 + seed, **axes) for seed in range(seeds)]
    for at, (arm, effect) in enumerate(effects.items()):
        own = [SPREAD[(seed + at) % 6] for seed in range(seeds)]
        found += [row(arm, seed, 5.0 + seed + effect + own[seed], **axes) for seed in range(seeds)]
    return found


def only(records: Sequence[Record], compared: Compared = LOSS) -> Family:
    arms = list(dict.fromkeys(record.arm for record in records))
    (found,) = families(records, [compared], arms, "base")
    return found


def test_one_arm_of_six_seeds_is_judged_by_the_exact_test() -> None:
    family = only(rows({"far": 1.0}))
    assert family.exact
    assert family.rows[0].flipped == family.rows[0].adjusted == 2 / 64
    assert family.rows[0].verdict == "different"
    assert family.rows[0].difference.value == pytest.approx(1.0 + sum(SPREAD) / 6)


def test_several_arms_of_six_seeds_are_judged_by_holm_over_t() -> None:
    records = rows({"far": 1.0, "near": 0.05, "same": 0.0})
    family = only(records)
    assert (family.exact, family.needed) == (False, 7)
    assert [found.verdict for found in family.rows] == [
        "different",
        "different, within the margin",
        "same within the margin",
    ]
    values = {record.arm: record.value for record in records if record.seed == 0}
    assert set(values) == {"base", "far", "near", "same"}
    differences = {
        arm: [float(a.value or 0) - float(b.value or 0) for a, b in zip(there, records[:6], strict=True)]
        for arm in ("far", "near", "same")
        if (there := [record for record in records if record.arm == arm])
    }
    adjusted = holm_adjusted({arm: paired_t(values) for arm, values in differences.items()})
    harmless = holm_adjusted({arm: equivalence(values, 0.1) for arm, values in differences.items()})
    assert {found.arm: found.adjusted for found in family.rows} == adjusted
    assert {found.arm: found.equivalent for found in family.rows} == harmless


def test_seven_seeds_are_enough_for_the_exact_test_of_three_arms() -> None:
    assert only(rows({"a": 1.0, "b": 0.05, "c": 0.0}, seeds=7)).exact


def test_a_wide_spread_is_not_enough_evidence_and_says_what_would_have_been() -> None:
    noisy = [row("base", seed, 5.0) for seed in range(6)]
    noisy += [row("arm", seed, 5.0 + 30 * SPREAD[seed]) for seed in range(6)]
    (found,) = only(noisy).rows
    assert found.verdict == "not enough evidence"
    assert found.detectable is not None
    assert found.detectable > 30 * max(SPREAD) / 2


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    (found,) = only(rows({"arm": 1.0}, seeds=1)).rows
    assert found.verdict == "one seed: no verdict"
    assert found.difference == Estimate(1.0 + SPREAD[0], None, None, 1) or found.difference.low is None
    assert (found.interval, found.flipped, found.adjusted, found.equivalent, found.detectable) == (None,) * 5


def test_an_arm_with_one_seed_does_not_stop_the_others() -> None:
    records = [record for record in rows({"a": 1.0, "b": 1.0}) if record.arm != "b" or record.seed == 0]
    assert [found.verdict for found in only(records).rows] == ["different", "one seed: no verdict"]


def test_only_seeds_that_both_have_are_paired_and_errors_are_none() -> None:
    records = [*rows({"arm": 1.0}, seeds=7)[1:], row("arm", 9, None)]
    (found,) = only(records).rows
    assert found.difference.n == 6


def test_more_pairs_than_signs_can_be_tried_for_are_judged_by_t() -> None:
    family = only(rows({"arm": 1.0}, seeds=24))
    assert (family.exact, family.rows[0].flipped, family.rows[0].interval) == (False, None, None)
    assert family.rows[0].verdict == "different"


def test_each_point_of_the_axes_is_a_family_of_its_own() -> None:
    records = rows({"arm": 1.0}, steps=10) + rows({"arm": 0.0}, steps=20)
    found = families(records, [LOSS], ["base", "arm"], "base")
    assert [(family.axes, family.rows[0].verdict) for family in found] == [
        ({"steps": 10}, "different"),
        ({"steps": 20}, "same within the margin"),
    ]
    late = families(records, [replace(LOSS, where={"steps": 20})], ["base", "arm"], "base")
    assert [family.axes for family in late] == [{"steps": 20}]


def test_a_baseline_alone_has_nothing_to_be_compared_with() -> None:
    assert families(rows({}), [LOSS], ["base"], "base") == ()
    assert families([], [LOSS], ["base"], "base") == ()


@pytest.mark.parametrize("arms, seeds, exact", [(5, 8, True), (5, 6, False)])
def test_where_nothing_differs_a_family_finds_something_in_one_of_twenty(
    arms: int, seeds: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels' Holm calls it: most of its time, and no part of it
    chance, trials, wrong = np.random.default_rng(0), 150, 0
    names = [f"arm_{at}" for at in range(arms)]
    for _ in range(trials):
        values = chance.normal(0.0, 1.0, (arms + 1, seeds))
        lines = zip(["base", *names], values.tolist(), strict=True)
        records = [row(name, seed, value) for name, line in lines for seed, value in enumerate(line)]
        family = only(records)
        assert family.exact is exact
        wrong += any(found.verdict.startswith("different") for found in family.rows)
    # 0.05 and three standard errors of 150 trials: without Holm five arms would be wrong in about one of five
    assert wrong / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


@pytest.mark.parametrize(
    "change, error",
    [
        ({"metric": "los"}, "metric='los'"),
        ({"margin": 0.0}, r"margin=0.0: must be above 0"),
        ({"why": " "}, "why=' ': must be text"),
    ],
)
def test_a_comparison_without_a_margin_and_its_reason_is_refused(change: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        replace(LOSS, **change)  # type: ignore[arg-type]


def test_a_study_compares_metrics_that_it_declares(coin: Study) -> None:
    with pytest.raises(ValueError, match="compared='flops': must be one of loss, peak_bytes"):
        replace(coin, compared=(replace(LOSS, metric="flops"),))
    assert replace(coin, compared=(LOSS,)).compared == (LOSS,)


def test_a_verdict_needs_both_families() -> None:
    known = {"arm": "a", "difference": Estimate(0.0, None, None, 2)}
    verdicts = {
        (p, q): Comparison(**known, adjusted=p, equivalent=q).verdict  # type: ignore[arg-type]
        for p in (0.01, 0.5)
        for q in (0.01, 0.5)
    }
    assert verdicts == {
        (0.01, 0.01): "different, within the margin",
        (0.01, 0.5): "different",
        (0.5, 0.01): "same within the margin",
        (0.5, 0.5): "not enough evidence",
    }
