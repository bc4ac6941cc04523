"""Counts worked by hand, against a plain loop, and the published behaviour of e4m3 on outliers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.precision import E4M3, E5M2, FP16, Recipe, count, round_trip

TENSOR, ROW, TILE, BLOCK = (None, None), (1, None), (1, 128), (128, 128)


def test_a_plain_cast_worked_by_hand() -> None:
    # In e4m3: 500 overflows to 448, 0.0009 is below half of 2^-9 and vanishes, 1.1 becomes 1.125, 0 and 2 stay.
    x = torch.tensor([[500.0, 0.0009, 1.1, 0.0, 2.0]])
    counts = count(x, Recipe(format=E4M3, scale="none"))
    assert (counts.elements, counts.nonzero, counts.overflowed, counts.underflowed) == (5, 4, 1, 1)
    assert (counts.overflow_share, counts.underflow_share) == (0.2, 0.25)
    noise = (500 - 448) ** 2 + 0.0009**2 + 0.025**2
    assert counts.sqnr_db == pytest.approx(10 * math.log10(x.double().square().sum().item() / noise), rel=1e-6)
    # The smallest tenth of four values is one value, and it is lost whole.
    assert (counts.small, counts.small_value_error) == (1, 1.0)


def test_nothing_lost_is_infinitely_good_and_an_empty_or_zero_tensor_has_no_shares() -> None:
    exact = count(torch.tensor([[1.0, 2.0, 448.0]]), Recipe(format=E4M3))
    assert (exact.sqnr_db, exact.underflow_share, exact.small_value_error) == (math.inf, 0.0, 0.0)
    for nothing in (torch.zeros(3, 3), torch.empty(0, 3)):
        counts = count(nothing, Recipe(format=E4M3, tile=TILE))
        assert (counts.overflow_share, counts.underflow_share, counts.small_value_error) == (0.0, 0.0, 0.0)


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([TENSOR, ROW, TILE, BLOCK]))
def test_counts_are_those_of_a_plain_loop_over_elements(
    rows: int, columns: int, seed: int, tile: tuple[int | None, int | None]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).mul(3).exp()
    x[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    recipe = Recipe(format=E4M3, tile=tile)
    counts, kept = count(x, recipe), round_trip(x, recipe)
    pairs = list(zip(x.flatten().tolist(), kept.flatten().tolist(), strict=True))
    errors = sorted((abs(a), abs(a - b)) for a, b in pairs if a)
    tenth = errors[: math.ceil(len(errors) / 10)]
    assert counts.nonzero == len(errors)
    assert counts.underflowed == sum(1 for a, b in pairs if a and not b)
    assert counts.overflowed == 0
    assert counts.noise == pytest.approx(sum((a - b) ** 2 for a, b in pairs), rel=1e-9)
    assert counts.small_error == pytest.approx(sum(error / size for size, error in tenth), rel=1e-9)


def test_counts_of_two_tensors_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    top, bottom = torch.randn(40, 128, generator=generator), torch.randn(24, 128, generator=generator) * 1e-3
    recipe = Recipe(format=E4M3, tile=TILE)
    both, apart = count(torch.cat([top, bottom]), recipe), count(top, recipe) + count(bottom, recipe)
    assert (apart.elements, apart.nonzero, apart.underflowed) == (both.elements, both.nonzero, both.underflowed)
    assert apart.sqnr_db == pytest.approx(both.sqnr_db)


def test_non_finite_elements_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="non-finite elements of x=2: must be 0"):
        count(torch.tensor([[1.0, math.inf, math.nan]]), Recipe(format=E4M3))


@pytest.mark.parametrize("tile", [TENSOR, ROW, TILE, BLOCK])
@pytest.mark.parametrize("form, floor_db", [(E4M3, 31.4), (E5M2, 25.3)])
def test_gaussian_values_keep_the_sqnr_of_their_format(
    form: object, floor_db: float, tile: tuple[int | None, int | None]
) -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    counts = count(x, Recipe(format=form, tile=tile))
    # Uniform noise over a binade with m mantissa bits gives about 6.02 m + 13.5 dB; the block maximum adds some.
    assert floor_db <= counts.sqnr_db <= floor_db + 1.5


def test_smaller_tiles_lose_fewer_of_the_small_values_of_a_heavy_tailed_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator) * torch.randn(512, 512, generator=generator).mul(2.5).exp() * 1e-3
    lost = [count(x, Recipe(format=E4M3, tile=tile, floor=1e-30)).underflow_share for tile in (TENSOR, BLOCK, TILE)]
    assert lost[0] > 1.5 * lost[1] > 3 * lost[2] > 0


def test_fp16_without_scaling_loses_small_gradients_that_a_loss_scale_saves() -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 1e-8
    plain, scaled = (count(x * factor, Recipe(format=FP16, scale="none")) for factor in (1.0, 65536.0))
    assert plain.underflow_share > 0.9
    assert scaled.underflow_share < 1e-3
