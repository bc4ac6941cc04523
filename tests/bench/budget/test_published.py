"""Published figures, and the arithmetic of hours and prices."""

import pytest

from ablations.claims import ledger
from bench.budget import wall
from bench.budget.published import compared, recognised
from dsv3.config import presets, vary


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_lite", "article"])
def test_every_published_figure_is_met_within_its_rounding(name: str) -> None:
    rows = compared(presets.named(name).model)
    assert rows
    assert all(abs(row.deviation) < 0.025 for row in rows), [(row.quantity, row.deviation) for row in rows]


def test_the_published_figures_of_deepseek_v3() -> None:
    found = {row.quantity: row.ours for row in compared(presets.deepseek_v3().model)}
    assert found["parameters"] == 671_026_404_352
    assert found["active parameters"] == 37_552_282_624
    assert found["cache per token"] == 70_272
    assert found["training FLOPs per token"] == pytest.approx(250e9, rel=0.005)
    assert found["hours of a card, all stages"] == pytest.approx(2.788e6, rel=0.005)


def test_a_model_is_recognised_by_its_parameters_and_one_of_ones_own_is_not() -> None:
    model = presets.deepseek_v3().model
    assert recognised(vary(model, max_position_embeddings=4096)) == "deepseek_v3"
    assert compared(vary(model, num_hidden_layers=60)) == ()


def test_hours_worked_by_hand() -> None:
    run = wall.Run(name="", flops_per_token=1e9, tokens=3.6e12 * 0.9895, cards=100, utilisation=0.5, price=3.0)
    assert run.card_hours == pytest.approx(2000.0)
    assert (run.hours, run.dollars) == (pytest.approx(20.0), pytest.approx(6000.0))
    assert run.cards_for_72_hours == pytest.approx(2000 / 72)


def test_the_claims_hold_or_fail_as_the_inputs_that_they_leave_out_are_chosen() -> None:
    hours = [run.hours for _, run in wall.varied()]
    assert min(hours) < wall.HOURS_ASKED < max(hours)
    ratios = dict(wall.ratios())
    assert min(ratios.values()) < wall.RATIO_ASKED < max(ratios.values())
    assert ratios["itself"] == 1.0


def test_the_ledger_says_what_the_arithmetic_gives() -> None:
    ratios, runs = dict(wall.ratios()), dict(wall.varied())
    costs = ("dense, the same tokens", "dense, 20 tokens per parameter", "sparse, the same tokens, 20% of the peak")
    assert all(f"{ratios[name]:.2f} of" in ledger()["H1"].why for name in costs)
    cards = ("2 trillion tokens", "as DeepSeek-V3 trained", "all parameters active")
    assert all(f" {runs[name].cards_for_72_hours:.0f} " in ledger()["H2"].why for name in cards)


def test_the_implied_share_of_the_peak_is_the_published_one() -> None:
    assert wall.implied_utilisation() == pytest.approx(wall.UTILISATION, rel=0.01)
