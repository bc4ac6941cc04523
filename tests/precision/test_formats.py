"""Formats against their definition: every code of 8 and 16 bits, the boundaries between numbers, and torch's casts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.precision.formats import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    Format,
    cast,
    named,
    overflows,
    power_of_two,
    round_exact,
)

EIGHT_BITS = (E4M3, E5M2)
SIXTEEN_BITS = (FP16, BF16)
by_name = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
eight_bits = pytest.mark.parametrize("form", EIGHT_BITS, ids=lambda form: form.name)
sixteen_bits = pytest.mark.parametrize("form", SIXTEEN_BITS, ids=lambda form: form.name)


def positive_numbers(form: Format) -> list[float]:
    """Every non-negative finite number of the format, ascending: codes of one sign are ordered as their numbers are."""
    return [form.decode(code) for code in range(form.max_code + 1)]


def boundaries(form: Format, numbers: list[float]) -> torch.Tensor:
    """Numbers, the middles between neighbours and fp32's next numbers around them, of both signs, in fp32."""
    ascending = torch.tensor(numbers, dtype=torch.float64)
    middles = (ascending[:-1] + ascending[1:]) / 2
    exact = torch.cat([ascending, middles]).float()
    assert torch.equal(exact.double(), torch.cat([ascending, middles])), "fp32 holds every middle of a 16-bit format"
    up, down = exact.nextafter(torch.tensor(math.inf)), exact.nextafter(torch.tensor(-math.inf))
    points = torch.cat([exact, up, down])
    points = points[points.abs() <= form.max]
    return torch.cat([points, -points])


def nearest_in_table(x: float, form: Format, numbers: list[float]) -> float:
    """By search: the closest number; of two equally close ones that with the even code."""
    distances = [(abs(abs(x) - number), code % 2, number) for code, number in enumerate(numbers)]
    return math.copysign(min(distances)[2], x)


@pytest.mark.parametrize(
    "form, largest, smallest_normal, smallest_subnormal, eps",
    [
        (E4M3, 448.0, 2.0**-6, 2.0**-9, 2.0**-3),
        (E5M2, 57344.0, 2.0**-14, 2.0**-16, 2.0**-2),
        (FP16, 65504.0, 2.0**-14, 2.0**-24, 2.0**-10),
        (BF16, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7),
        (FP32, (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2.0**-23),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
def test_the_limits_are_the_published_ones(
    form: Format, largest: float, smallest_normal: float, smallest_subnormal: float, eps: float
) -> None:
    assert form.max == largest
    assert form.smallest_normal == smallest_normal
    assert form.smallest_subnormal == smallest_subnormal
    assert form.eps == eps


@by_name
def test_the_limits_are_those_that_torch_reports(form: Format) -> None:
    info = torch.finfo(form.dtype)
    assert (form.bits, form.max, form.smallest_normal, form.eps) == (info.bits, info.max, info.tiny, info.eps)


@pytest.mark.parametrize(
    "form, code, number",
    [
        (E4M3, 0b0_0000_000, 0.0),
        (E4M3, 0b0_0000_001, 2.0**-9),
        (E4M3, 0b0_0111_000, 1.0),
        (E4M3, 0b1_0111_100, -1.5),
        (E4M3, 0b0_1111_110, 448.0),
        (E5M2, 0b0_01111_01, 1.25),
        (E5M2, 0b0_11110_11, 57344.0),
        (E5M2, 0b1_11111_00, -math.inf),
    ],
)
def test_a_code_decodes_to_the_number_worked_by_hand(form: Format, code: int, number: float) -> None:
    assert form.decode(code) == number


@pytest.mark.parametrize("form", [*EIGHT_BITS, *SIXTEEN_BITS], ids=lambda form: form.name)
def test_every_code_decodes_as_torch_reads_it(form: Format) -> None:
    raw = torch.arange(1 << form.bits, dtype=torch.int32)
    codes = raw.to(torch.uint8) if form.bits == 8 else raw.to(torch.int16)
    ours = torch.tensor([form.decode(code) for code in raw.tolist()], dtype=torch.float64)
    torch.testing.assert_close(codes.view(form.dtype).double(), ours, rtol=0, atol=0, equal_nan=True)


def test_a_code_that_does_not_fit_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match="code=256: must fit 8 bits"):
        E4M3.decode(256)


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"format='e3m4': must be one of e4m3, e5m2, fp16, bf16, fp32"):
        named("e3m4")
    assert named("e5m2") is E5M2


@eight_bits
def test_exact_rounding_finds_the_nearest_of_all_numbers_at_every_boundary(form: Format) -> None:
    numbers = positive_numbers(form)
    points = boundaries(form, numbers)
    expected = torch.tensor([nearest_in_table(x, form, numbers) for x in points.tolist()], dtype=torch.float64)
    assert torch.equal(round_exact(points, form), expected)


@eight_bits
def test_the_cast_to_eight_bits_is_exact_rounding_at_every_boundary(form: Format) -> None:
    points = boundaries(form, positive_numbers(form))
    assert torch.equal(cast(points, form).double(), round_exact(points, form))


@sixteen_bits
def test_the_cast_to_sixteen_bits_is_exact_rounding_at_sampled_boundaries(form: Format) -> None:
    numbers = positive_numbers(form)
    for sample in (numbers[:600], numbers[600:-600:17], numbers[-600:]):
        points = boundaries(form, sample)
        assert torch.equal(points.to(form.dtype).double(), round_exact(points, form))


@by_name
def test_rounding_beyond_the_largest_number_gives_the_special_and_only_there(form: Format) -> None:
    bound = torch.tensor(form.overflow_bound, dtype=torch.float64)
    points = torch.stack(
        [torch.tensor(form.max, dtype=torch.float64), bound, bound * (1 - 2**-50), bound * (1 + 2**-50)]
    )
    points = torch.cat([points, -points])
    rounded = round_exact(points, form)
    assert torch.equal(~rounded.isfinite(), overflows(points, form))
    special = rounded[~rounded.isfinite()]
    assert bool((special.isnan() if form.specials == "fn" else special.isinf()).all())


@pytest.mark.parametrize(
    "form, inside, outside", [(E4M3, 464.0, 464.01), (E5M2, 61439.99, 61440.0), (FP16, 65519.99, 65520.0)]
)
def test_the_first_magnitude_that_overflows_is_the_one_worked_by_hand(
    form: Format, inside: float, outside: float
) -> None:
    points = torch.tensor([inside, -inside, outside, -outside], dtype=torch.float64)
    assert overflows(points, form).tolist() == [False, False, True, True]


@by_name
def test_the_cast_saturates_and_keeps_nan(form: Format) -> None:
    codes = cast(torch.tensor([math.inf, -math.inf, 2 * min(form.max, 1e38), math.nan]), form).float()
    largest = 1e38 * 2 if form.max > 1e38 else form.max
    assert codes[:2].tolist() == [form.max, -form.max]
    assert codes[2].item() == pytest.approx(largest, rel=form.eps)
    assert codes[3].isnan()


def test_a_special_stays_special_under_exact_rounding() -> None:
    points = torch.tensor([math.inf, -math.inf, math.nan])
    assert round_exact(points, E5M2).tolist()[:2] == [math.inf, -math.inf]
    assert bool(round_exact(points, E4M3).isnan().all())
    assert bool(round_exact(points, E5M2)[2].isnan())


def test_powers_of_two_are_exact_over_the_normal_range_of_float64() -> None:
    exponents = range(-1022, 1024)
    expected = torch.tensor([math.ldexp(1.0, one) for one in exponents], dtype=torch.float64)
    assert torch.equal(power_of_two(torch.tensor(list(exponents))), expected)


@by_name
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_is_idempotent_odd_and_off_by_at_most_half_a_step(form: Format, x: float) -> None:
    point = torch.tensor([x], dtype=torch.float64)
    rounded = round_exact(point, form)
    if bool(overflows(point, form)):
        assert not rounded.isfinite()
        return
    assert torch.equal(round_exact(rounded, form), rounded)
    assert torch.equal(round_exact(-point, form), -rounded)
    assert abs(rounded.item() - x) <= max(form.eps / 2 * abs(x), form.smallest_subnormal / 2)


@by_name
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_rounding_never_swaps_two_numbers(form: Format, values: list[float]) -> None:
    ascending = round_exact(torch.tensor(sorted(values), dtype=torch.float64).clamp(-form.max, form.max), form)
    assert bool((ascending.diff() >= 0).all())
