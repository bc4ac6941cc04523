"""Cases of precision: what a product gains in a narrower format, what autocast leaves of it, what codes cost to make.

Timed are the formats that the machine multiplies itself; the others become "pending" records with the reason, since the
time of an emulated product says nothing. Inputs of a bare product are in the format already, so its ratio is a ceiling
for any training step; the layer under autocast converts its fp32 weight in each call, as training does.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from bench.cases import Figures, Run, sessions
from bench.measurement import Point
from bench.native import why_no_speed
from bench.record import Profile
from dsv3.config import BFloat16, Float16, Float32, Precision
from dsv3.precision import BF16, E4M3, FP16, FP32, Format, Recipe, autocast, quantise, round_exact
from dsv3.precision.block_scale import scaled

ROWS = {"quick": 512, "full": 4096}
WIDTHS = (256, 1024)
REDUCED: Mapping[str, tuple[Precision, Format]] = {"bf16": (BFloat16(), BF16), "fp16": (Float16(), FP16)}
QUANTISED: Mapping[str, Recipe] = {
    "e4m3 1 x 128": Recipe(format=E4M3, tile=(1, 128)),
    "e4m3 1 x 128 ue8m0": Recipe(format=E4M3, tile=(1, 128), scale="ue8m0"),
    "e4m3 128 x 1": Recipe(format=E4M3, tile=(128, 1)),
    "e4m3 128 x 128": Recipe(format=E4M3, tile=(128, 128)),
}


def bench_product(measure_arms: Callable[..., Figures], run: Run, device: torch.device, profile: Profile) -> None:
    """A bare matrix product of operands that are in the format already."""
    rows, width = ROWS[profile], WIDTHS[-1]
    x, weight = _operands(rows, width, device)
    bound = x.abs() @ weight.abs()
    real = _real(run, "forward", {"rows": rows, "width": width, "case": "product"})
    pairs = {"fp32": (x, weight)} | {name: (x.to(form.dtype), weight.to(form.dtype)) for name, form in real.items()}

    def check() -> None:
        for name, form in real.items():
            # Both operands and the result are rounded once; sums run in fp32.
            tolerance = 1.5 * form.eps + width * FP32.eps
            difference = (pairs[name][0] @ pairs[name][1]).float() - x @ weight
            assert bool((difference.abs() <= tolerance * bound).all()), f"{name} is off by more than its rounding"

    measure_arms(
        phase="forward",
        baseline="fp32",
        arms={name: _product(*pair) for name, pair in pairs.items()},
        check=check,
        axes={"rows": rows, "width": width, "case": "product"},
    )


@pytest.mark.parametrize("width", WIDTHS)
def bench_autocast(
    measure_arms: Callable[..., Figures], run: Run, device: torch.device, profile: Profile, width: int
) -> None:
    """A linear layer forward and backward under autocast: fp32 weights, converted in each call."""
    rows = ROWS[profile]
    x = _operands(rows, width, device)[0].requires_grad_()
    layer = nn.Linear(width, width, bias=False, device=device)
    real = _real(run, "forward_backward", {"rows": rows, "width": width, "case": "autocast"})
    calls = {"fp32": _layer_call(layer, x, Float32())}
    calls |= {name: _layer_call(layer, x, REDUCED[name][0]) for name in real}

    def check() -> None:
        exact = calls["fp32"]()
        for name, form in real.items():
            for ours, theirs in zip(calls[name](), exact, strict=True):
                error = ((ours - theirs).norm() / theirs.norm()).item()
                assert error <= form.eps, f"{name} is off by {error:.2g}, more than rounding its operands explains"

    measure_arms(
        phase="forward_backward",
        baseline="fp32",
        arms=calls,
        check=check,
        axes={"rows": rows, "width": width, "case": "autocast"},
    )


def bench_quantise(measure_arms: Callable[..., Figures], device: torch.device, profile: Profile) -> None:
    """Codes and scales of a matrix against a plain copy of it: what a step on codes pays per operand."""
    rows, width = ROWS[profile], WIDTHS[-1]
    x = _operands(rows, width, device)[0]

    def check() -> None:
        for recipe in QUANTISED.values():
            found = quantise(x, recipe)
            exact = round_exact(scaled(x, found.scale, recipe), recipe.format)
            assert torch.equal(found.codes.double(), exact), f"codes of {recipe} are not exact rounding"

    arms: dict[str, Callable[[], object]] = {"copy": x.clone, "bf16": x.bfloat16}
    arms |= {name: _quantise(x, recipe) for name, recipe in QUANTISED.items()}
    axes = {"rows": rows, "width": width, "case": "quantise"}
    measure_arms(phase="forward", baseline="copy", arms=arms, check=check, axes=axes)


def _operands(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    return x.to(device), torch.randn(width, width, generator=generator).to(device)


def _real(run: Run, phase: str, axes: Mapping[str, str | int]) -> dict[str, Format]:
    """The reduced formats that are timed here; for the others a record says why not."""
    real = {}
    for name, (precision, form) in REDUCED.items():
        why = why_no_speed(precision, run.device)
        if why is None:
            real[name] = form
            continue
        where = dict(axes) | {"device": run.device, "phase": phase}
        point = Point(study="bench_precision", arm=name, baseline="fp32", axes=where)
        hands = [hand for session in sessions(run.device) for hand in session.hands]
        run.keep_failures(point, [f"{phase}_{hand}_ratio" for hand in hands], f"pending: {why}")
    return real


def _product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: x @ weight


def _quantise(x: Tensor, recipe: Recipe) -> Callable[[], object]:
    return lambda: quantise(x, recipe)


def _layer_call(layer: nn.Linear, x: Tensor, precision: Precision) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        x.grad = layer.weight.grad = None
        with autocast(precision, x.device.type):
            y = layer(x)
        y.float().square().sum().backward()  # of a mean, gradients would lie below fp16's normal numbers
        assert x.grad is not None, "x asks for a gradient"
        assert layer.weight.grad is not None, "the weight asks for a gradient"
        return y.detach().float(), x.grad, layer.weight.grad

    return call
