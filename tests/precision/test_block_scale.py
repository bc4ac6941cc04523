"""Block scaling: hand-worked tiles, a naive loop over tiles as oracle, and the properties that hold for any tensor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import Float8Block
from dsv3.precision.block_scale import (
    GRADIENT_FLOOR,
    PUBLISHED_FLOOR,
    Quantised,
    Recipe,
    dequantise,
    quantise,
    recipes,
    round_trip,
    round_up,
    scaled,
)
from dsv3.precision.formats import BF16, E4M3, E5M2, FP16, FP32, overflows, round_exact

sizes = st.sampled_from([1, 2, 5, 60, 63, 100, 128, 130])
quick = settings(max_examples=60)
any_recipe = st.builds(
    Recipe,
    format=st.sampled_from([E4M3, E5M2]),
    tile=st.sampled_from([(1, 128), (128, 1), (128, 128), (1, 16), (3, 7), (None, None), (1, None)]),
    scale=st.sampled_from(["fp32", "ue8m0"]),
    floor=st.sampled_from([PUBLISHED_FLOOR, GRADIENT_FLOOR]),
)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Matrices of awkward shapes whose elements spread over many binades, with zeros and whole tiles of zeros."""
    rows, columns, seed = draw(sizes), draw(sizes), draw(st.integers(0, 2**31))
    spread, level = draw(st.sampled_from([0.0, 1.0, 4.0])), draw(st.integers(-20, 20))
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, columns, generator=generator)
        * torch.randn(rows, columns, generator=generator).mul(spread).exp()
    )
    x = x * 2.0**level
    if draw(st.booleans()):
        x[: rows // 2] = 0
    return x


def naive(x: torch.Tensor, recipe: Recipe) -> Quantised:
    """One tile after the other; rounding by definition."""
    rows = recipe.tile[0] or x.shape[0]
    columns = recipe.tile[1] or x.shape[1]
    codes = torch.zeros(x.shape, dtype=torch.float64)
    scale = torch.zeros(math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / columns))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            amax = max(x[at].abs().max().item(), torch.tensor(recipe.floor).item())
            one = torch.tensor(amax) / recipe.format.max
            if recipe.scale == "ue8m0":
                one = torch.tensor(2.0 ** math.ceil(math.log2(one.item())))
            scale[i, j] = one
            codes[at] = round_exact(x[at] / one, recipe.format)
    return Quantised(codes=codes, scale=scale, recipe=recipe)


def test_a_tensor_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, -896.0], [0.0, 0.0, 0.3]])
    quantised = quantise(x, Recipe(format=E4M3, tile=(1, 2)))
    # Tiles (1, 2) | (-896) | (0, 0) | (0.3): scales 2/448, 2, the floor and 0.3/448.
    assert torch.equal(quantised.scale, torch.tensor([[2.0, 896.0], [1e-4, 0.3]]) / 448)
    assert quantised.codes.float().tolist() == [[224.0, 448.0, -448.0], [0.0, 0.0, 448.0]]
    assert quantised.codes.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(dequantise(quantised), x, rtol=2**-23, atol=0)


def test_a_code_between_two_numbers_is_rounded_to_the_even_one() -> None:
    # The scale is 1, and above 16 e4m3 counts in twos: 17 lies between 16 (mantissa 000) and 18 (001), 19 nears 20.
    x = torch.tensor([[448.0, 17.0, 19.0, 17.1]])
    assert round_trip(x, Recipe(format=E4M3, tile=(1, 4))).tolist() == [[448.0, 16.0, 20.0, 18.0]]


def test_ue8m0_rounds_the_scale_up_to_a_power_of_two() -> None:
    scale = torch.tensor([3 / 448, 2.0**-3, 1.0, 1.5, 0.75 * 2.0**-100, math.inf])
    assert round_up(scale).tolist() == [2.0**-7, 2.0**-3, 1.0, 2.0, 2.0**-100, math.inf]
    assert round_up(torch.tensor([math.nan])).isnan()


def test_every_ue8m0_scale_is_a_number_of_torch_s_e8m0() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 64)[:, None]
    scale = quantise(x, Recipe(format=E4M3, tile=(1, 128), scale="ue8m0", floor=GRADIENT_FLOOR)).scale
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)


def test_the_published_floor_lifts_the_scale_of_a_small_tile_and_the_gradient_floor_does_not() -> None:
    x = torch.full((1, 128), 1e-10)
    assert quantise(x, Recipe(format=E4M3, tile=(1, 128))).scale.item() == pytest.approx(1e-4 / 448)
    assert round_trip(x, Recipe(format=E4M3, tile=(1, 128))).tolist() == [[0.0] * 128]
    kept = round_trip(x, Recipe(format=E4M3, tile=(1, 128), floor=GRADIENT_FLOOR))
    torch.testing.assert_close(kept, x, rtol=E4M3.eps / 2, atol=0)


def test_the_recipes_of_a_precision_scale_each_product_along_its_sum() -> None:
    use = recipes(Float8Block(block=128))
    assert (use.activation.tile, use.weight.tile, use.gradient.tile) == ((1, 128), (128, 128), (1, 128))
    assert use.activation.transposed().tile == (128, 1)
    assert (use.activation.floor, use.gradient.floor) == (PUBLISHED_FLOOR, GRADIENT_FLOOR)
    assert recipes(Float8Block(format="e5m2", scale="ue8m0")).weight == Recipe(
        format=E5M2, tile=(128, 128), scale="ue8m0"
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_a_tile_with_a_non_finite_element_becomes_nan_and_its_neighbours_do_not(bad: float, scale: str) -> None:
    x = torch.ones(2, 6)
    x[0, 4] = bad
    kept = round_trip(x, Recipe(format=E4M3, tile=(1, 3), scale=scale))
    assert kept.isnan().tolist() == [[False, False, False, True, True, True], [False] * 6]


def test_a_plain_cast_has_scale_one_and_clamps() -> None:
    x = torch.tensor([[1e6, 1.0, -1e6]])
    quantised = quantise(x, Recipe(format=FP16, scale="none"))
    assert quantised.scale.tolist() == [[1.0]]
    assert dequantise(quantised).tolist() == [[65504.0, 1.0, -65504.0]]


def test_an_empty_tensor_has_no_tiles_and_stays_empty() -> None:
    for tile in ((1, 128), (128, 1), (128, 128), (None, None)):
        assert round_trip(torch.empty(0, 60), Recipe(format=E4M3, tile=tile)).shape == (0, 60)


def test_a_recipe_without_floor_or_with_an_empty_tile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"floor=0\.0: must be above 0"):
        Recipe(format=E4M3, floor=0.0)
    with pytest.raises(ValueError, match=r"tile=\(0, 128\): its sides are 1 or more"):
        Recipe(format=E4M3, tile=(0, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_round_trip_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert round_trip(torch.randn(5, 7).to(dtype), Recipe(format=E4M3, tile=(1, 4))).dtype == dtype


@quick
@given(matrices(), any_recipe)
def test_codes_and_scales_equal_the_naive_loop_bit_for_bit(x: torch.Tensor, recipe: Recipe) -> None:
    fast, slow = quantise(x, recipe), naive(x, recipe)
    assert torch.equal(fast.scale, slow.scale)
    assert torch.equal(fast.codes.double(), slow.codes)
    assert fast.codes.shape == x.shape


@quick
@given(matrices(), any_recipe)
def test_a_scale_from_amax_leaves_nothing_to_overflow(x: torch.Tensor, recipe: Recipe) -> None:
    before = scaled(x, quantise(x, recipe).scale, recipe)
    assert not overflows(before, recipe.format).any()


@quick
@given(matrices(), any_recipe)
def test_the_error_is_at_most_half_a_step_of_the_tile(x: torch.Tensor, recipe: Recipe) -> None:
    quantised = quantise(x, recipe)
    steps = scaled(x, quantised.scale, recipe)
    error = (quantised.codes.double() - steps.double()).abs()
    form = recipe.format
    # The division by the scale is itself rounded to fp32; that slack is its half step.
    bound = (form.eps / 2 * steps.abs().double() * (1 + FP32.eps)).clamp(min=form.smallest_subnormal / 2)
    assert bool((error <= bound).all())


@quick
@given(matrices(), any_recipe, st.integers(-8, 8))
def test_a_power_of_two_passes_through_when_no_floor_interferes(x: torch.Tensor, recipe: Recipe, shift: int) -> None:
    free = Recipe(format=recipe.format, tile=recipe.tile, scale=recipe.scale, floor=GRADIENT_FLOOR)
    assert torch.equal(round_trip(x * 2.0**shift, free), round_trip(x, free) * 2.0**shift)


@quick
@given(matrices(), any_recipe)
def test_a_transposed_tensor_under_the_transposed_recipe_has_the_transposed_codes(
    x: torch.Tensor, recipe: Recipe
) -> None:
    there, back = quantise(x, recipe), quantise(x.T, recipe.transposed())
    assert torch.equal(there.codes.float(), back.codes.float().T)
    assert torch.equal(there.scale, back.scale.T)


@quick
@given(matrices(), matrices(), any_recipe)
def test_leading_dimensions_are_separate_tensors(x: torch.Tensor, y: torch.Tensor, recipe: Recipe) -> None:
    rows, columns = min(x.shape[0], y.shape[0]), min(x.shape[1], y.shape[1])
    stacked = torch.stack([x[:rows, :columns], y[:rows, :columns]])
    apart = torch.stack([round_trip(one, recipe) for one in stacked])
    assert torch.equal(round_trip(stacked, recipe), apart)


@quick
@given(matrices(), any_recipe)
def test_what_was_rounded_once_with_power_of_two_scales_is_not_moved_again(x: torch.Tensor, recipe: Recipe) -> None:
    powers = Recipe(format=recipe.format, tile=recipe.tile, scale="ue8m0", floor=recipe.floor)
    once = round_trip(x, powers)
    assert torch.equal(round_trip(once, powers), once)


def test_bf16_as_a_plain_cast_is_torch_s_bf16() -> None:
    x = torch.randn(33, 17, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(x, Recipe(format=BF16, scale="none")), x.bfloat16().float())
