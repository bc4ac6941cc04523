"""What a step does to a state: accumulation, balance, capacity, precision, gradients that are not finite."""

import pytest
import torch

from dsv3.config import (
    AdamW,
    Adaptive,
    BFloat16,
    Config,
    Fixed,
    Float8Block,
    Float16,
    Precision,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SwitchLoss,
    vary,
)
from dsv3.moe.bias import margins, quantile_bias
from dsv3.parallel import Ranks
from dsv3.train.state import TrainState
from dsv3.train.step import StepReport, train_step
from tests.train import small

ROUNDING = 2e-6  # sums of some thousand fp32 terms (eps 6e-8) in another order


def stepped(config: Config, seed: int = 0, steps: int = 1) -> tuple[TrainState, StepReport]:
    state = TrainState.create(config, seed=seed)
    for rows in small.rows(config, batches=steps):
        report = train_step(state, rows)
    return state, report


def moved(config: Config) -> tuple[torch.Tensor, StepReport]:
    """The change of all weights in one step of plain descent: the gradient, times the rate."""
    before = small.flat(TrainState.create(config, seed=0).model.state_dict())
    state, report = stepped(config)
    return small.flat(state.model.state_dict()) - before, report


def with_parts(config: Config, parts: int) -> Config:
    return vary(config, **{"train.accumulation_steps": parts})


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_only_rounding_with_per_sequence_losses_and_no_capacity(parts: int) -> None:
    whole, report = moved(small.config())
    in_parts, same = moved(with_parts(small.config(), parts))
    assert small.relative_distance(whole, in_parts) < ROUNDING
    assert same.losses == pytest.approx(report.losses, rel=ROUNDING)
    assert same.max_vio == report.max_vio
    assert same.grad_norm == pytest.approx(report.grad_norm, rel=ROUNDING)


@pytest.mark.parametrize("loss", [QuadraticLoss(alpha=1.0), SwitchLoss(alpha=1.0)])
def test_accumulation_changes_batch_wide_losses_which_see_each_microbatch_alone(
    loss: QuadraticLoss | SwitchLoss,
) -> None:
    config = small.config((loss,))
    whole, report = moved(config)
    in_parts, other = moved(with_parts(config, 4))
    assert small.relative_distance(whole, in_parts) > 100 * ROUNDING
    assert other.losses["main"] == pytest.approx(report.losses["main"], rel=ROUNDING)
    if isinstance(loss, QuadraticLoss):
        assert other.losses["balance_quadratic"] > report.losses["balance_quadratic"], (
            "mean of squares > square of mean"
        )


def test_accumulation_changes_what_a_fixed_capacity_drops_but_not_the_loads() -> None:
    config = small.config((SequenceLoss(),), **{"model.moe.capacity": Fixed(factor=1.0)})
    _, report = moved(config)
    _, other = moved(with_parts(config, 4))
    assert report.dropped > 0
    assert other.dropped > report.dropped, "four small queues overflow more than one long one"
    assert other.max_vio == report.max_vio, "loads are counted before dropping"


def test_the_bias_moves_by_its_rate_against_the_loads_of_the_whole_batch() -> None:
    config = small.config((SignBias(rate=0.25),), **{"train.accumulation_steps": 2})
    state = TrainState.create(config, seed=0)
    (rows,) = small.rows(config)
    with torch.no_grad():
        counts = [routing.counts for routing in state.model(rows[:, :-1]).routing]
    train_step(state, rows)
    for layer, loads in zip(state.expert_layers, counts, strict=True):
        expected = 0.25 * (loads.double().mean() - loads).sign().float()
        assert torch.equal(layer.gate.e_score_correction_bias, expected)
        assert expected.abs().sum() > 0


def test_an_exact_quantile_is_of_all_scores_of_the_step() -> None:
    config = small.config((QuantileBias(bins=None),))
    state = TrainState.create(config, seed=0)
    (rows,) = small.rows(config)
    with torch.no_grad():
        scores = [routing.scores for routing in state.model(rows[:, :-1]).routing]
    train_step(state, rows)
    for layer, each in zip(state.expert_layers, scores, strict=True):
        expected = quantile_bias(torch.zeros(4), margins(each, torch.zeros(4), 2), 2)
        assert torch.equal(layer.gate.e_score_correction_bias, expected)
        assert expected.abs().sum() > 0


def test_an_exact_quantile_is_refused_where_several_processes_share_a_step() -> None:
    config = small.config((QuantileBias(bins=None),))
    state = TrainState.create(config, seed=0)
    (rows,) = small.rows(config)
    with pytest.raises(ValueError, match=r"processes=2: must be alone with QuantileBias\(bins=None\)"):
        train_step(state, rows, ranks=Ranks(rank=0, world=2))
    assert state.step == 0


def test_an_adaptive_capacity_follows_the_loads_of_whole_steps_and_drops_by_those_before() -> None:
    config = small.config((SequenceLoss(),), **{"model.moe.capacity": Adaptive(momentum=0.5)})
    parts = with_parts(config, 4)
    whole, in_parts = (stepped(config) for config in (config, parts))
    (first, report), (second, same) = whole, in_parts
    assert report.dropped == same.dropped == 0.0, "nothing is known before the first step"
    for layer, other, max_vio in zip(first.expert_layers, second.expert_layers, report.max_vio, strict=True):
        assert layer.largest_load is not None
        assert layer.largest_load.item() == pytest.approx(1 + max_vio)
        assert torch.equal(layer.largest_load, other.largest_load), "counts are sums over microbatches"
    tight, report = stepped(vary(config, **{"model.moe.capacity": Adaptive(momentum=0.0)}), steps=2)
    assert all(
        layer.largest_load.item() == pytest.approx(1 + vio)
        for layer, vio in zip(tight.expert_layers, report.max_vio, strict=True)
    )


def test_a_skipped_update_leaves_an_adaptive_capacity_alone() -> None:
    config = small.config(**{"model.moe.capacity": Adaptive()})
    state = TrainState.create(config, seed=0)
    state.model.lm_head.weight.data.fill_(float("inf"))
    (rows,) = small.rows(config)
    assert train_step(state, rows).health != "ok"
    assert all(layer.largest_load.isinf() for layer in state.expert_layers)


def test_max_vio_is_counted_before_dropping() -> None:
    config = small.config((), **{"model.moe.capacity": Fixed(factor=0.5)})
    state = TrainState.create(config, seed=0)
    (rows,) = small.rows(config)
    with torch.no_grad():
        loads = [routing.counts.double() for routing in state.model(rows[:, :-1]).routing]
    report = train_step(state, rows)
    assert report.max_vio == pytest.approx([(load.max() / load.mean() - 1).item() for load in loads])
    assert 0.4 < report.dropped < 0.8


def test_without_the_weight_of_multi_token_prediction_its_module_does_not_run_or_move() -> None:
    config = small.config(**{"train.mtp_loss_weight": 0.0})
    before = TrainState.create(config, seed=0).model.mtp.state_dict()
    state, report = stepped(config)
    assert "mtp" not in report.losses
    assert len(report.max_vio) == 1
    assert all(torch.equal(value, before[name]) for name, value in state.model.mtp.state_dict().items())


def test_the_gradient_is_clipped_to_the_norm_and_reported_before_it() -> None:
    config = small.config((SequenceLoss(),))
    free, report = moved(config)
    clipped, same = moved(vary(config, **{"train.clip_grad_norm": report.grad_norm / 10}))
    assert same.grad_norm == pytest.approx(report.grad_norm)
    assert free.norm().item() == pytest.approx(config.train.optimizer.lr * report.grad_norm, rel=1e-4)
    assert small.relative_distance(free / 10, clipped) < 1e-4  # differences of fp32 weights of 0.3 lose digits


def test_the_report_counts_tokens_and_takes_the_scheduled_rate() -> None:
    config = small.config(**{"train.schedule.warmup": 0.4})
    _, report = stepped(config, steps=2)
    assert report.step == 2
    assert report.tokens == 4 * 8
    assert report.lr == pytest.approx(0.05 * 2 / 4)
    assert report.seconds > 0
    assert report.cpu_seconds > 0


@pytest.mark.parametrize("precision", [BFloat16(), Float16(), Float8Block()])
def test_every_precision_takes_a_step_near_that_of_fp32(precision: Precision) -> None:
    config = small.config(**{"train.optimizer": AdamW(lr=1e-3)})
    _, exact = stepped(config)
    state, report = stepped(vary(config, **{"train.precision": precision}))
    assert report.health == "ok"
    assert report.losses["main"] == pytest.approx(exact.losses["main"], rel=0.1)
    assert (state.loss_scale is not None) == isinstance(precision, Float16)


def test_a_gradient_that_is_not_finite_skips_the_update_and_says_so() -> None:
    config = small.config(**{"model.moe": None, "model.mtp": None})
    state = TrainState.create(config, seed=0)
    with torch.no_grad():
        state.model.norm.weight.fill_(float("inf"))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    report = train_step(state, small.rows(config)[0])
    assert report.health == "skipped: gradient that is not finite"
    assert report.step == state.step == 1
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())


def test_an_overflow_in_fp16_halves_the_loss_scale_and_leaves_weights_and_biases() -> None:
    config = small.config(**{"train.precision": Float16(init_scale=2.0**40)})
    state = TrainState.create(config, seed=0)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    report = train_step(state, small.rows(config)[0])
    assert report.health.startswith("skipped: ")
    assert state.loss_scale is not None
    assert state.loss_scale.scale == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
