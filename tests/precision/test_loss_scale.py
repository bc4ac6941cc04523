"""Dynamic loss scaling against torch's GradScaler, step by step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config import BFloat16, Float8Block, Float16, Float32, Precision
from dsv3.precision import LossScale, initial, unscale, update
from dsv3.precision.formats import FP32

GRADIENTS = st.sampled_from([1.0, -0.25, 3e-8, math.inf, -math.inf, math.nan])


def test_a_sequence_worked_by_hand() -> None:
    state = LossScale(scale=8.0, growth_interval=2)
    seen = []
    for reason in (None, None, None, "infinite gradient", None, "NaN gradient", None, None):
        state = update(state, reason)
        seen.append((state.scale, state.good_steps))
    assert seen == [(8, 1), (16, 0), (16, 1), (8, 0), (8, 1), (4, 0), (4, 1), (8, 0)]
    assert state.skipped == {"infinite gradient": 1, "NaN gradient": 1}


@given(st.lists(GRADIENTS, min_size=1, max_size=25), st.integers(1, 4), st.sampled_from([1.0, 3.7, 65536.0]))
def test_scale_steps_and_weights_are_those_of_torch_s_scaler(
    gradients: list[float], interval: int, init_scale: float
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=interval)
    state = LossScale(scale=init_scale, growth_interval=interval)
    theirs, ours = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.5) for weight in (theirs, ours)]
    for gradient in gradients:
        scaler.scale(torch.zeros(1))  # builds the scaler's state; losses are not needed to give it gradients
        theirs.grad = torch.tensor([1.0, gradient, 0.5]) * scaler.get_scale()
        ours.grad = torch.tensor([1.0, gradient, 0.5]) * state.scale
        scaler.step(optimizers[0])
        scaler.update()
        reason = unscale([ours.grad], state)
        if reason is None:
            optimizers[1].step()
        state = update(state, reason)
        assert state.scale == pytest.approx(scaler.get_scale(), rel=FP32.eps)
        assert torch.equal(ours, theirs)


def test_gradients_are_divided_in_place_and_judged_together() -> None:
    state = LossScale(scale=4.0, growth_interval=2000)
    gradients = [torch.tensor([4.0, -8.0]), torch.tensor([[2.0]])]
    assert unscale(gradients, state) is None
    assert [gradient.tolist() for gradient in gradients] == [[1.0, -2.0], [[0.5]]]
    assert unscale([torch.ones(2), torch.tensor([math.inf])], state) == "infinite gradient"
    assert unscale([torch.tensor([math.inf]), torch.tensor([math.nan])], state) == "NaN gradient"


def test_a_step_without_gradients_is_a_good_step() -> None:
    assert unscale([], LossScale(scale=2.0, growth_interval=1)) is None


def test_the_scale_stops_growing_where_fp32_ends() -> None:
    state = LossScale(scale=2.0**127, growth_interval=1)
    assert update(state, None).scale == 2.0**127


def test_gradients_that_are_never_finite_end_the_run_with_the_reason() -> None:
    state = LossScale(scale=65536.0, growth_interval=2000)
    for _ in range(40):
        state = update(state, "NaN gradient")
    with pytest.raises(FloatingPointError, match=r"NaN gradient at loss scale 5.96046e-08 after 40 skipped steps"):
        update(state, "NaN gradient")


def test_at_its_limit_one_step_in_interval_plus_one_is_skipped() -> None:
    state, skipped = LossScale(scale=1024.0, growth_interval=50), 0
    for _ in range(51 * 20):
        reason = "infinite gradient" if state.scale > 1024 else None
        skipped += reason is not None
        state = update(state, reason)
    assert skipped == 20


def test_fp16_starts_with_the_configured_scale_and_no_other_precision_has_one() -> None:
    assert initial(Float16(init_scale=128.0, growth_interval=7)) == LossScale(scale=128.0, growth_interval=7)
    others: tuple[Precision, ...] = (Float32(), BFloat16(), Float8Block())
    assert [initial(precision) for precision in others] == [None] * 3
