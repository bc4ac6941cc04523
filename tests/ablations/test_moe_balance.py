"""The study of balance: what its quick cell measures, losses at equal evenness, its sentence and its pictures."""

import math
from dataclasses import replace
from statistics import stdev
from typing import Any

import pytest
from scipy.stats import t

from ablations import moe_balance
from ablations.balance_methods import STRENGTHS
from ablations.evidence import NoEvidence
from ablations.moe_balance import EXPERTS, LAYERS, STUDY, cells, configured, measure
from ablations.moe_balance_answer import (
    ALPHA,
    BASELINE,
    BUSIEST,
    COMPARISONS,
    HEADLINE,
    JUDGED,
    MARGIN,
    MATCHED,
    OVERALL,
    answer,
    loss_at,
    matched_losses,
    most_even,
)
from ablations.moe_balance_pictures import heat, trade
from ablations.significance import POWER, detectable, holm_adjusted, paired_t, pairs_to_see
from ablations.study import Reading
from ablations.traced import Prose
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, failure, record
from bench.record import Record
from reports import twins
from reports.figures import draw
from reports.frame import summary
from reports.pages import study_page

WHERE = provenance("full")

AXES: dict[str, Any] = {"steps": 300, "rows": 8}


def kept(
    arm: str, strength: str, seed: int, *, excess: float, loss: float, spread: float | None = None
) -> list[Record]:
    """What a training leaves for the answer. Unless another is given, the excess squared CV is a hundredth of what the
    excess MaxVio is, and a fifth as much over all of the text.
    """
    at = {"device": "cpu", "strength": strength, **AXES}
    spread = excess / 100 if spread is None else spread
    found: tuple[tuple[dict[str, Any], str, float], ...] = (
        (dict(BUSIEST), "excess_max_vio", excess),
        ({**BUSIEST, "over_layers": "max"}, "excess_max_vio", 2 * excess),
        (dict(JUDGED), HEADLINE, spread),
        (dict(OVERALL), HEADLINE, spread / 5),
        (dict(OVERALL), "max_vio", excess / 10),
        ({}, "loss", loss),
    )
    return [
        record(
            Point(study="moe_balance", arm=arm, baseline=BASELINE, seed=seed, axes={**at, **axes}),
            WHERE,
            Measurement(metric=metric, value=value),
        )
        for axes, metric, value in found
    ]


def records(seeds: int = 6) -> list[Record]:
    """The bias passes MATCHED between two strengths; the batch's loss is evener and 0.02 worse everywhere."""
    found: list[Record] = []
    for seed in range(seeds):
        shift = 0.01 * seed
        found += kept("none", "default", seed, excess=12.0 + seed, loss=4.6 + shift)
        found += kept(BASELINE, "rate 0.0003", seed, excess=5.0, loss=4.60 + shift)
        found += kept(BASELINE, "default", seed, excess=1.25, loss=4.64 + shift)
        found += kept(BASELINE, "rate 0.003", seed, excess=3.0, loss=5.0 + shift)
        found += kept("global_batch", "default", seed, excess=MATCHED, loss=4.64 + 0.001 * (seed % 2) + shift)
    return found


def dying(arm: str, strength: str, seed: int, dead: float) -> list[Record]:
    """Experts that a batch leaves dead; all of the text leaves half as many."""
    at = {"device": "cpu", "strength": strength, **AXES}
    return [
        record(
            Point(study="moe_balance", arm=arm, baseline=BASELINE, seed=seed, axes={**at, **where}),
            WHERE,
            Measurement(metric="dead_experts", value=value),
        )
        for where, value in ((JUDGED, dead), (OVERALL, dead / 2))
    ]


def contrast(gaps: dict[str, list[float]]) -> list[Record]:
    """The bias, and losses that are these above it where both are as even as MATCHED."""
    found = [row for seed in range(6) for row in kept(BASELINE, "default", seed, excess=MATCHED, loss=4.6)]
    found += kept("none", "default", 0, excess=12.0, loss=4.6)
    for arm, gaps_of_arm in gaps.items():
        for seed, gap in enumerate(gaps_of_arm):
            found += kept(arm, "default", seed, excess=MATCHED, loss=4.6 + gap)
    return found


@pytest.fixture(scope="module")
def measured() -> list[Reading]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_balance, "HELD_OUT", 4)
        cell = next(cell for cell in cells("quick") if cell.arm == BASELINE)
        return measure(replace(cell, axes={"strength": "default", "steps": 2, "rows": 2}))


def test_every_method_is_trained_at_each_of_its_strengths_and_at_the_default() -> None:
    full = cells("full")
    assert {(cell.arm, cell.axes["strength"]) for cell in full} == {
        (arm, strength) for arm, strengths in STRENGTHS.items() for strength in strengths
    }
    assert all("default" in strengths for strengths in STRENGTHS.values())
    assert {cell.seed for cell in full} == set(range(6))
    assert {arm for arm, strengths in STRENGTHS.items() if len(strengths) >= 4} == {
        "quadratic", "switch", "global_batch", "sequence", "sign_bias", "proportional", "quantile", "similarity",
    }  # fmt: skip


def test_strengths_rise_and_defaults_are_the_configs() -> None:
    for arm, strengths in STRENGTHS.items():
        methods = [balance[-1] for balance in strengths.values() if balance]
        values = [getattr(method, "alpha", getattr(method, "rate", 0.0)) for method in methods]
        assert values == sorted(values), arm
        for method in strengths["default"]:
            assert method == type(method)()


def test_a_cell_judges_both_texts_and_keeps_loads_of_the_last_layer(measured: list[Reading]) -> None:
    metrics = {(one.measurement.metric, one.axes.get("text")) for one in measured if one.measurement}
    both = set(moe_balance.STUDY.metrics) - {"loss", "load_to_mean", "excess_over_blocks"}
    assert metrics == {(metric, text) for metric in both for text in ("train", "held_out")} | {
        ("loss", None), ("load_to_mean", None), ("excess_over_blocks", "held_out"),
    }  # fmt: skip
    ratios = [one.measurement.value for one in measured if one.measurement and one.measurement.metric == "load_to_mean"]
    assert len(ratios) == 2 * EXPERTS
    assert math.fsum(ratios) == pytest.approx(2 * EXPERTS)


def test_a_training_that_diverges_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(*_: Any) -> None:
        raise FloatingPointError("step 1: loss is not finite")

    monkeypatch.setattr("bench.routed_training.routed", diverges)
    (reading,) = measure(cells("quick")[0])
    assert reading.failed == "step 1: loss is not finite"


def test_a_loss_is_read_between_the_two_strengths_around_it() -> None:
    assert loss_at([(8.0, 1.0), (2.0, 3.0)], 4.0) == pytest.approx(2.0)
    assert loss_at([(8.0, 1.0), (4.0, 3.0)], 4.0) == pytest.approx(3.0)


def test_strengths_that_overshoot_do_not_count() -> None:
    assert loss_at([(8.0, 1.0), (2.0, 3.0), (4.0, 9.0)], 4.0) == pytest.approx(2.0)


def test_a_method_evener_at_every_strength_has_its_weakest_loss_and_one_never_as_even_none() -> None:
    assert loss_at([(3.0, 1.0), (2.0, 5.0)], 4.0) == 1.0
    assert loss_at([(9.0, 1.0), (5.0, 5.0)], 4.0) is None


def test_the_most_even_strength_and_losses_at_equal_evenness() -> None:
    found = records()
    strength, spread = most_even(found, BASELINE)
    assert (strength, spread.value) == ("default", pytest.approx(0.0125))
    losses = matched_losses(found, BASELINE, 300)
    assert losses[0] == pytest.approx(4.62)  # 2.5 lies halfway between 1.25 and 5 on a logarithmic scale
    assert losses.keys() == set(range(6))
    assert matched_losses(found, "none", 300) == {}


def test_the_answer_names_the_most_even_and_the_gap_with_what_could_be_seen() -> None:
    said = Prose.of(answer(records()))
    assert f"{BASELINE} at default" in said
    assert "global_batch 0.02" in said
    assert "Never as even at any strength: none." in said
    assert "DeepSeek-V3 reports" not in said, "no record says what a sequence-wise loss does"
    assert "router even over all text" not in said, "no record says how much that is"
    with pytest.raises(NoEvidence):
        answer([])


def test_the_answer_says_what_blocks_leave_and_what_experts_that_choose_become() -> None:
    choosing = kept("expert_choice", "default", 0, excess=11.0, loss=4.7)
    over = [
        record(
            judged_at(strength),
            WHERE,
            Measurement(metric="excess_over_blocks", value=value),
        )
        for strength, value in (("default", 1.2), ("rate 0.003", 1.04))
    ]
    said = Prose.of(answer([*records(), *choosing, *over]))
    assert "the mean by 1.2 times what" in said, "of the strength that is most even, whatever others have"
    assert "even by force in training, are at 0.11 in a batch and 0.022 over all of the text when" in said.replace(
        " (n=1, no interval)", ""
    )


def test_a_method_that_looks_ahead_is_never_the_most_even() -> None:
    found = records()
    found += [row for seed in range(6) for row in kept("expert_choice", "default", seed, excess=1.0, loss=4.6)]
    assert f"most even causal method, {BASELINE} at default" in Prose.of(answer(found))


def test_the_most_even_method_stands_beside_those_it_is_not_told_from_and_its_loss_beside_the_biass() -> None:
    assert "a paired t test at 0.05/12 tells it from all others." in Prose.of(answer(records()))
    found = records()
    for seed in range(6):
        found += kept("switch", "alpha 1", seed, excess=1.2, loss=4.67 + 0.02 * seed)
        found += kept("proportional", "default", seed, excess=1.0, spread=0.0121 + 0.001 * (-1) ** seed, loss=4.6)
        found += kept("quantile", "default", seed, excess=1.1, spread=0.014 + 0.00001 * seed, loss=4.6)
    said = Prose.of(answer(found))
    assert "most even causal method, switch at alpha 1, after" in said
    rivals = said[said.index("does not tell it from") :].split(". ")[0]
    assert "proportional at default (0.0121 [" in rivals
    assert "quantile" not in rivals
    assert "nat/token, which less that of sign_bias at default (excess squared CV 0.0125) is 0.055 [" in said


def test_the_answer_begins_with_the_headline_in_a_batch_and_over_all_of_the_text() -> None:
    found = records()
    for seed in range(6):
        found += kept(BASELINE, "rate 0.01", seed, excess=1.5, spread=0.01, loss=4.6)
        found += kept("deepseek_v3", "default", seed, excess=1.1, spread=0.03, loss=4.6)
    said = Prose.of(answer(found))
    assert said.startswith("On held-out text, each token for itself, the squared coefficient of variation")
    best = f"the most even causal method, {BASELINE} at rate 0.01"
    assert f"chance's by 0.01 in a batch and 0.002 over all of the text with {best}, after 300 steps" in said
    assert "0.0125 in a batch and 0.0025 over all of the text with DeepSeek-V3's bias (sign_bias), " in said
    assert "0.03 in a batch and 0.006 over all of the text with its bias and sequence loss together" in said
    assert "over all of the text with nothing (none)." in said
    assert f"1.5 with {BASELINE} at rate 0.01 (3 in the worst layer, 0.15 of the mean over all of the text), " in said
    assert f"1.25 with {BASELINE} at default (2.5 in the worst layer, 0.125 of the mean over all" in said


def test_the_answer_says_whether_experts_die() -> None:
    found = records()
    for arm, dead in ((BASELINE, 0.0), ("none", 2.0)):
        found += [row for seed in range(6) for row in dying(arm, "default", seed, dead)]
    said = Prose.of(answer(found))
    assert "leaves 0 experts without a token in a batch and 0 in all of the text" in said
    assert "where nothing balances, 2 are left in a batch" in said


SPREAD = (-0.001, 0.001, -0.0005, 0.0005, 0.0002, -0.0002)


@pytest.mark.parametrize(
    "gap, batch_wise, sequence_wise",
    [
        (0.0, "reproduced", "not decidable"),
        (0.003, "reproduced", "reproduced"),
        (0.0045, "not decidable", "reproduced"),
        (-0.02, "refuted", "refuted"),
        (0.02, "refuted", "reproduced"),
    ],
)
def test_the_published_contrast_is_reproduced_refuted_or_not_decidable(
    gap: float, batch_wise: str, sequence_wise: str
) -> None:
    gaps = [gap + part for part in SPREAD]
    said = Prose.of(answer(contrast(dict.fromkeys(("switch", "global_batch", "sequence"), gaps))))
    assert f"an end within {MARGIN:g} of the bias's is {batch_wise} for global_batch, " in said
    assert f", and {batch_wise} for switch, " in said
    assert f"a higher one is {sequence_wise} for sequence, " in said
    least = float(f"{detectable(gaps, alpha=ALPHA / COMPARISONS):.2g}")
    assert said.count(f"(seen from {least:.4g})") == 2 * 3


def test_beside_the_published_difference_stands_what_these_seeds_show_and_how_many_would_show_it() -> None:
    gaps = [10 * part for part in SPREAD]
    said = Prose.of(answer(contrast(dict.fromkeys(("switch", "global_batch", "sequence"), gaps))))
    least = float(f"{detectable(gaps, alpha=ALPHA / COMPARISONS):.2g}")
    assert least > MARGIN
    assert f"show differences of at least {least:.4g} for global_batch, {least:.4g} for switch, {least:.4g} for" in said
    alone, within = (pairs_to_see(MARGIN, gaps, ALPHA / COMPARISONS, power) for power in (POWER, (1 + POWER) / 2))
    assert within > alone > 6
    assert f"it takes {alone} seeds to show {MARGIN:g} for sequence" in said
    assert f"{within} for global_batch and {within} for switch to show that an end lies within it." in said


def test_nothing_is_said_of_the_published_contrast_before_all_seeds() -> None:
    gaps = {arm: [0.0003, 0.0001, 0.0002] for arm in ("switch", "global_batch", "sequence")}
    said = Prose.of(answer(contrast(gaps)))
    assert "of the bias's is not decidable for global_batch" in said
    assert "a higher one is not decidable for sequence" in said


@pytest.mark.parametrize("shift, told", [(0.98, False), (1.02, True)])
def test_the_contrast_is_judged_at_the_level_at_which_holm_begins_in_the_table(shift: float, told: bool) -> None:
    (family,) = STUDY.compared
    assert family.margin == MARGIN
    assert len(STUDY.arms) - 1 == COMPARISONS
    edge = float(t.ppf(1 - ALPHA / COMPARISONS / 2, len(SPREAD) - 1)) * stdev(SPREAD) / len(SPREAD) ** 0.5
    gaps = [shift * edge + part for part in SPREAD]
    adjusted = holm_adjusted({"sequence": paired_t(gaps)}, COMPARISONS)["sequence"]
    assert (adjusted <= ALPHA) is told
    said = Prose.of(answer(contrast(dict.fromkeys(("switch", "global_batch", "sequence"), gaps))))
    assert ("a higher one is reproduced" in said) is told


def test_a_strength_that_diverged_hides_nothing_of_the_others() -> None:
    lost = [row for row in records() if row.axes["strength"] != "rate 0.003"]
    failed = [failure(judged_at("rate 0.003"), WHERE, "loss", "loss is not finite")]
    assert Prose.of(answer([*lost, *failed])) == Prose.of(answer(lost))


def judged_at(strength: str) -> Point:
    axes = {"device": "cpu", "text": "held_out", "loads": "batch", "strength": strength, **AXES}
    return Point(study="moe_balance", arm=BASELINE, baseline=BASELINE, seed=0, axes=axes)


def test_the_trade_is_a_line_for_each_method_through_its_strengths() -> None:
    picture = trade(summary(records()))
    spread, busiest = twins.of_picture(picture, "trade")
    assert (spread.caption, busiest.caption) == ("By squared CV", "By MaxVio")
    assert spread.head[1:] == busiest.head[1:] == ("none", "global_batch", BASELINE)
    for axes, factor in zip(picture.axes, (0.01, 1.0), strict=True):
        (bias,) = [line for line in axes.lines if line.get_label() == BASELINE]
        assert list(bias.get_xdata()) == pytest.approx([5 * factor, 1.25 * factor, 3 * factor]), "from weak to strong"


@pytest.mark.parametrize("loads, least", [("batch", 0.0125), ("all", 0.0025)])
def test_the_headline_has_a_picture_in_a_batch_and_over_all_of_the_text(loads: str, least: float) -> None:
    (figure,) = [figure for figure in STUDY.figures if figure.name == f"{HEADLINE}_{loads}"]
    _, (table,) = draw(STUDY, figure, records())
    assert [row[0] for row in table.rows] == ["none", "global_batch", BASELINE], "at default strengths"
    assert float(table.rows[2][1]) == pytest.approx(least)


def test_the_map_has_a_panel_for_each_method_and_no_table_its_loads(measured: list[Reading]) -> None:
    found = [
        record(
            Point(study="moe_balance", arm=one.arm, baseline=BASELINE, seed=0, axes={**AXES, **one.axes}),
            WHERE,
            one.measurement,
        )
        for one in measured
        if one.measurement and one.measurement.metric in ("load_to_mean", "gini")
    ]
    tables = " ".join(table.caption for table in study_page(moe_balance.STUDY, found, {}).tables)
    assert "gini" in tables.lower()
    assert "load" not in tables
    picture = heat(summary(found))
    (table,) = twins.of_picture(picture, "heat")
    assert len(table.rows) == EXPERTS
    assert [axes.get_title() for axes in picture.axes][:1] == [BASELINE]
    with pytest.raises(NoEvidence):
        heat(summary(records()))


def test_the_model_has_as_many_expert_layers_as_are_declared() -> None:
    assert configured("none", "default", steps=1, rows=1).model.num_hidden_layers == LAYERS
