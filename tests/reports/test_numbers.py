import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.numbers import interval, number, place, plain, spelt, with_unit


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.12345, "share", "12.3%"),
        (0.0003, "share", "0.03%"),
        (2.3, "ratio", "2.3x"),
        (1.0, "ratio", "1x"),
        (1536, "B", "1.5 KiB"),
        (3 * 2**30, "B", "3 GiB"),
        (70272, "B/token", "68.6 KiB/token"),
        (671026404352, "parameters", "671 G"),
        (2.5e12, "FLOP", "2.5 TFLOP"),
        (12345.6, "token/s", "12346"),
        (-0.0, "nat/token", "0"),
        (1e-9, "nat/token", "1.00e-09"),
        (2664000, "h", "2.66 M"),
    ],
)
def test_a_number_is_written_in_its_units_scale(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_an_interval_stands_beside_its_value_where_there_is_one() -> None:
    assert interval(0.31, 0.29, 0.33) == "0.31 [0.29, 0.33]"
    assert interval(0.31, 0.29, 0.33, "ratio") == "0.31x [0.29, 0.33]"
    assert interval(0.31, 0.29, 0.33, "share") == "31% [29%, 33%]"
    assert interval(2.5 * 2**20, 2**21, 3 * 2**20, "B") == "2.5 [2, 3] MiB"
    assert interval(2**20, 2**19, 2**21, "B") == "1 MiB [512 KiB, 2 MiB]"
    assert interval(5, 5, 5, "B") == "5 B"
    assert interval(5, math.nan, math.nan) == "5"


def test_a_place_is_short() -> None:
    values = (16384, 2**20, 1000, 14.8e12, 1.2, 3e-4, "late", 2.0)
    assert [place(value) for value in values] == ["16K", "1024K", "1000", "14.8 T", "1.2", "3.00e-04", "late", "2"]


def test_names_of_the_code_are_spelt_as_one_writes_them() -> None:
    assert spelt("forward_backward_cpu_ratio") == "forward backward CPU ratio"
    assert spelt("excess_max_vio") == "excess MaxVio"
    assert spelt("attention_gpu") == "attention GPU"
    assert (with_unit("length"), with_unit("ranks")) == ("length (tokens)", "ranks")


@given(st.floats(-1e30, 1e30))
def test_three_figures_are_within_half_a_percent(value: float) -> None:
    assert float(plain(value)) == pytest.approx(value, rel=5.1e-3, abs=1e-300)
