"""Every arm against the baseline: what the two families of tests say, and how often they say it for nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ablations.catalogue import every, load
from ablations.claims import ledger
from ablations.code import ROOT
from ablations.comparison import Compared, Comparison, Family, families
from ablations.evidence import Estimate
from ablations.significance import Judged, detectable, detectable_by_flips, equivalence, holm_adjusted, paired_t
from ablations.study import Study
from bench.record import Record
from bench.record import load as load_records

LOSS = Compared("loss", margin=0.1, why="a tenth is nothing here")
REFERENCE = load_records(ROOT / "reports" / "reference" / "records.jsonl").records
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


def only(records: Sequence[Record], compared: Compared = LOSS, seeds: int | None = None, more: str = "") -> Family:
    """The only family: the arms that have records and those of `more`, and as many seeds declared as there are."""
    arms = [*dict.fromkeys(record.arm for record in records), *more.split()]
    seeds = seeds or len({record.seed for record in records})
    (found,) = families(records, [compared], arms=arms, baseline="base", seeds=seeds)
    return found


def judged(found: Comparison) -> Judged:
    assert found.judged is not None
    return found.judged


def test_one_arm_of_six_seeds_is_judged_by_the_exact_test() -> None:
    family = only(rows({"far": 1.0}))
    assert family.exact
    assert judged(family.rows[0]).flipped == judged(family.rows[0]).adjusted == 2 / 64
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
    assert {found.arm: judged(found).adjusted for found in family.rows} == adjusted
    assert {found.arm: found.equivalent for found in family.rows} == harmless


def test_seven_seeds_are_enough_for_the_exact_test_of_three_arms() -> None:
    assert only(rows({"a": 1.0, "b": 0.05, "c": 0.0}, seeds=7)).exact


def test_a_wide_spread_is_not_enough_evidence_and_says_what_would_have_been() -> None:
    noisy = [row("base", seed, 5.0) for seed in range(6)]
    noisy += [row("arm", seed, 5.0 + 30 * SPREAD[seed]) for seed in range(6)]
    (found,) = only(noisy).rows
    assert found.verdict == "not enough evidence"
    assert judged(found).detectable > 30 * max(SPREAD) / 2


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    (found,) = only(rows({"arm": 1.0}, seeds=1), seeds=6).rows
    assert found.verdict == "needs the full profile (1 of 6 seeds)"
    assert found.difference is not None
    assert (found.difference.value, found.difference.low) == (pytest.approx(1.0 + SPREAD[0]), None)
    assert (found.interval, found.judged, found.equivalent) == (None,) * 3


def test_there_is_no_verdict_before_the_last_declared_seed() -> None:
    """Two seeds whose difference a t test would call different: what is seen is shown, what is decided is not."""
    records = [row("base", seed, 5.0) for seed in range(2)] + [
        row("arm", seed, 6.0 + 0.001 * seed) for seed in range(2)
    ]
    assert only(records).rows[0].verdict == "different"
    for seeds in range(2, 6):
        (found,) = only(rows({"arm": 1.0}, seeds=seeds), seeds=6).rows
        assert found.verdict == f"needs the full profile ({seeds} of 6 seeds)"
        assert (found.judged, found.equivalent) == (None, None)
        assert found.difference is not None
        assert found.difference.low is not None
        assert found.difference.low < 1.0 < (found.difference.high or 0)


def test_seeds_beyond_the_declared_revise_no_verdict() -> None:
    records = [*rows({"arm": 0.0}, seeds=6), row("base", 6, 11.0), row("arm", 6, 99.0)]
    assert only(records[::-1], seeds=6).rows == only(records[:-2], seeds=6).rows
    assert only(records, seeds=6).rows[0].verdict == "same within the margin"


def test_an_arm_without_records_is_one_of_the_family() -> None:
    """One of three arms is measured: it is tested as one of three, by the test that three arms have."""
    records = rows({"arm": 0.01})
    alone, among = only(records), only(records, more="lost later")
    assert (alone.exact, alone.needed, among.exact, among.needed) == (True, 6, False, 7)
    assert [found.verdict for found in among.rows][1:] == ["needs the full profile (0 of 6 seeds)"] * 2
    found, values = among.rows[0], [0.01 + own for own in SPREAD]
    assert judged(found).adjusted == pytest.approx(3 * paired_t(values))
    assert found.equivalent == pytest.approx(3 * equivalence(values, 0.1))
    assert judged(found).detectable == pytest.approx(detectable(values, 0.05 / 3))


def test_an_arm_that_never_has_the_metric_is_left_out_by_name() -> None:
    records = rows({"arm": 0.01})
    family = only(records, replace(LOSS, arms=("arm",)), more="timed counted")
    assert (family.arms, [found.arm for found in family.rows], family.exact) == (("arm",), ["arm"], True)


def test_arms_may_be_held_against_another_arm_than_the_studys_baseline() -> None:
    records = rows({"a": 1.0, "b": 1.01, "c": 0.0})
    arms = ["base", "a", "b", "c"]
    moved = replace(LOSS, arms=("b",), baseline="a")
    first, second = families(records, [replace(LOSS, arms=("a", "c")), moved], arms=arms, baseline="base", seeds=6)
    assert (first.baseline, first.arms, second.baseline, second.arms) == ("base", ("a", "c"), "a", ("b",))
    assert [found.verdict for found in first.rows] == ["different", "same within the margin"]
    (found,) = second.rows
    assert found.difference is not None
    assert found.difference.value == pytest.approx(0.01, abs=0.01)
    (whole,) = families(records, [replace(LOSS, baseline="a")], arms=arms, baseline="base", seeds=6)
    assert whole.arms == ("base", "b", "c")


def test_an_arm_that_lacks_a_seed_does_not_stop_the_others() -> None:
    records = [record for record in rows({"a": 1.0, "b": 1.0}) if record.arm != "b" or record.seed == 0]
    found = only(records).rows
    assert [row.verdict for row in found] == ["different", "needs the full profile (1 of 6 seeds)"]


def test_only_seeds_that_both_have_are_paired_and_errors_are_none() -> None:
    records = [*rows({"arm": 1.0}, seeds=7)[1:], row("arm", 9, None)]
    (found,) = only(records, seeds=6).rows
    assert found.difference is not None
    assert found.difference.n == 6
    assert found.verdict == "different"


def test_records_of_unequal_texts_are_no_pair() -> None:
    records = rows({"arm": 1.0})
    reread = [
        replace(record, corpus="new") if (record.arm, record.seed) == ("arm", 0) else record for record in records
    ]
    (found,) = only(reread).rows
    assert found.difference is not None
    assert (found.difference.n, found.verdict) == (5, "needs the full profile (5 of 6 seeds)")
    apart = [replace(record, corpus=record.arm) for record in records]
    assert families(apart, [LOSS], arms=["arm"], baseline="base", seeds=6) == ()


def test_the_smallest_effect_in_sight_is_that_of_the_test_that_decides() -> None:
    (found,) = only(rows({"arm": 0.01})).rows
    values = [0.01 + own for own in SPREAD]
    assert judged(found).detectable == pytest.approx(detectable_by_flips(values))
    assert judged(found).detectable > 1.2 * detectable(values)


def test_more_pairs_than_signs_can_be_tried_for_are_judged_by_t() -> None:
    family = only(rows({"arm": 1.0}, seeds=24))
    assert (family.exact, judged(family.rows[0]).flipped, family.rows[0].interval) == (False, None, None)
    assert family.rows[0].verdict == "different"


def test_each_point_of_the_axes_is_a_family_of_its_own() -> None:
    records = rows({"arm": 1.0}, steps=10) + rows({"arm": 0.0}, steps=20)
    declared: dict[str, Any] = {"arms": ["base", "arm"], "baseline": "base", "seeds": 6}
    found = families(records, [LOSS], **declared)
    assert [(family.axes, family.rows[0].verdict) for family in found] == [
        ({"steps": 10}, "different"),
        ({"steps": 20}, "same within the margin"),
    ]
    late = families(records, [replace(LOSS, where={"steps": 20})], **declared)
    assert [family.axes for family in late] == [{"steps": 20}]


def test_a_baseline_alone_has_nothing_to_be_compared_with() -> None:
    for records, arms in ((rows({}), ["base"]), (rows({}), ["base", "arm"]), ([], ["base", "arm"])):
        assert families(records, [LOSS], arms=arms, baseline="base", seeds=6) == ()


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
    for arm in ("fair", "gold"):
        with pytest.raises(ValueError, match=rf"compared\.arms=\['{arm}'\]: must be of bent"):
            replace(coin, compared=(replace(LOSS, arms=("bent", arm)),))
    with pytest.raises(ValueError, match=r"compared\.baseline='gold': must be one of fair, bent"):
        replace(coin, compared=(replace(LOSS, baseline="gold"),))
    with pytest.raises(ValueError, match=r"compared\.arms=\['bent'\]: must be of fair"):
        replace(coin, compared=(replace(LOSS, arms=("bent",), baseline="bent"),))
    with pytest.raises(ValueError, match="seeds=1: must be at least 2 to compare arms"):
        replace(coin, compared=(LOSS,), rules=(), seeds={"quick": 1, "full": 1})


def test_whatever_is_moved_after_it_was_declared_moves_the_digest() -> None:
    family = only(rows({"arm": 0.0}))
    moves: list[dict[str, object]] = [
        {"compared": replace(LOSS, metric="bits_per_byte")},
        {"compared": replace(LOSS, margin=0.2)},
        {"compared": replace(LOSS, why="a fifth is nothing either")},
        {"compared": replace(LOSS, where={"steps": 20})},
        {"baseline": "arm"},
        {"arms": ("arm", "late")},
        {"seeds": 7},
    ]
    digests = {family.digest(), *(replace(family, **move).digest() for move in moves)}  # type: ignore[arg-type]
    assert len(digests) == 1 + len(moves)
    assert replace(family, rows=(), axes={"steps": 3}).digest() == family.digest(), "what was found is no part of it"


def trained(study: Study, compared: Compared) -> set[str]:
    """The arms that have the metric where it is compared: by the cells of an arm's own, or by the committed records."""
    cells = [cell for cell in study.cells("full") if compared.where.items() <= cell.axes.items()]
    named = {cell.arm for cell in cells if cell.arm is not None}
    rows = [row for row in REFERENCE if (row.study, row.metric) == (study.name, compared.metric)]
    return named or {row.arm for row in rows if compared.where.items() <= row.axes.items()}


@pytest.mark.parametrize("study", [study for study in every() if study.compared], ids=lambda study: study.name)
def test_a_study_declares_all_arms_that_have_the_metric_and_no_others(study: Study) -> None:
    for compared in study.compared:
        declared = compared.arms or tuple(arm.name for arm in study.arms if arm.name != study.baseline)
        if compared.baseline:  # some arms, against another one
            assert {*declared, compared.baseline} <= trained(study, compared)
        else:
            assert sorted(declared) == sorted(trained(study, compared) - {study.baseline})


def margin(name: str) -> float:
    (compared,) = load(name).compared
    return compared.margin


def test_a_margin_that_stands_twice_is_the_same() -> None:
    assert margin("latent_attention") == margin("multi_token") == ledger()["DS1"].margin
    assert margin(str(ROOT / "ablations" / "multi_token_tuned.py")) == margin("multi_token")
    assert margin(str(ROOT / "ablations" / "moe_factorial.py")) == margin("moe_capacity")


def test_a_verdict_needs_both_families() -> None:
    known = {"arm": "a", "seeds": 2, "difference": Estimate(0.0, None, None, 2)}
    verdicts = {
        (p, q): Comparison(**known, judged=Judged(flipped=p, adjusted=p, detectable=1.0), equivalent=q).verdict  # type: ignore[arg-type]
        for p in (0.01, 0.5)
        for q in (0.01, 0.5)
    }
    assert verdicts == {
        (0.01, 0.01): "different, within the margin",
        (0.01, 0.5): "different",
        (0.5, 0.01): "same within the margin",
        (0.5, 0.5): "not enough evidence",
    }
