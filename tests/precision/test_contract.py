"""One table, every precision: what a training run may rely on whichever it picks."""

import math

import pytest
import torch
from torch import Tensor, nn

from dsv3.config import BFloat16, Float8Block, Float16, Float32, Precision
from dsv3.precision import BF16, FP16, apply, autocast, initial, named, unscale, update

STEPS = 30
TABLE: list[tuple[str, Precision, float]] = [
    ("fp32", Float32(), 0.0),
    ("bf16", BFloat16(), BF16.eps),
    ("fp16", Float16(), FP16.eps),
    ("fp16, scale too high at first", Float16(init_scale=2.0**40), FP16.eps),
    ("fp8 e4m3", Float8Block(), named("e4m3").eps),
    ("fp8 e4m3 ue8m0", Float8Block(scale="ue8m0"), named("e4m3").eps),
    ("fp8 e4m3 in blocks of 16", Float8Block(block=16), named("e4m3").eps),
    ("fp8 e5m2", Float8Block(format="e5m2"), named("e5m2").eps),
]
every_precision = pytest.mark.parametrize("precision, eps", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])


class Run:
    """A small network learns a fixed map; the steps are those of any training loop."""

    def __init__(self, precision: Precision) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(24, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 8))
        x = torch.randn(100, 24)
        self.x, self.y = x, torch.sin(x[:, :8] + x[:, 8:16])
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        self.precision, self.state = precision, initial(precision)
        self.scope = apply(self.net, precision)
        self.losses = [self.step() for _ in range(STEPS)]

    def step(self) -> float:
        self.optimizer.zero_grad()
        with autocast(self.precision, "cpu"):
            loss = nn.functional.mse_loss(self.net(self.x).float(), self.y)
        factor = 1.0 if self.state is None else self.state.scale
        (loss * factor).backward()
        reason = None if self.state is None else unscale(self.gradients(), self.state)
        if reason is None:
            self.optimizer.step()
        if self.state is not None:
            self.state = update(self.state, reason)
        return loss.item()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]


@pytest.fixture(scope="module")
def in_fp32() -> Run:
    return Run(Float32())


@every_precision
def test_a_run_is_finite_and_learns(precision: Precision, eps: float) -> None:
    losses = Run(precision).losses
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.5 * losses[0]


@every_precision
def test_the_loss_stays_within_an_eighth_of_the_format_s_eps_of_fp32(
    precision: Precision, eps: float, in_fp32: Run
) -> None:
    run = Run(precision)
    skipped = 0 if run.state is None else sum(run.state.skipped.values())
    # A product of rounded operands is off by up to eps, relatively, and a sum of 60 independent ones by about 1/8 of
    # that. Each step adds its error to the next, but the runs descend to the same minimum, which takes errors back.
    taken = STEPS - skipped
    assert taken >= STEPS * 0.2
    assert abs(run.losses[0] - in_fp32.losses[0]) <= eps / 8 * in_fp32.losses[0]
    assert abs(run.losses[-1] - in_fp32.losses[taken - 1]) <= eps / 8 * in_fp32.losses[0]


@every_precision
def test_weights_and_gradients_stay_fp32(precision: Precision, eps: float) -> None:
    run = Run(precision)
    assert {parameter.dtype for parameter in run.net.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in run.gradients()} == {torch.float32}


@every_precision
def test_the_same_seed_gives_the_same_run_bit_for_bit(precision: Precision, eps: float) -> None:
    assert Run(precision).losses == Run(precision).losses


def test_a_loss_scale_that_is_too_high_costs_only_the_steps_it_skips(in_fp32: Run) -> None:
    run = Run(Float16(init_scale=2.0**40))
    assert run.state is not None
    assert sum(run.state.skipped.values()) > 0
    assert run.state.scale < 2.0**40
