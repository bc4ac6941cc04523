"""How numbers and intervals are written: three figures that matter, the unit's own scale, and what is not known left
out. A traced number keeps its sources in what is written.
"""

import math
from numbers import Real

from ablations.traced import mark, sources_of

UNITS = {"length": "tokens"}  # of axes whose name does not say it
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNTS = ("", "K", "M", "G", "T", "P", "E")


def number(value: float, unit: str = "") -> str:
    """A value with its unit: bytes in binary steps, counts in thousands, shares in percent."""
    match unit:
        case "B" | "B/token":
            return _scaled(value, 1024, _BINARY) + unit.removeprefix("B")
        case "share":
            return f"{100 * value:.3g}%"
        case "parameters" | "FLOP" | "allocations":
            return _scaled(value, 1000, _COUNTS) + (unit if unit == "FLOP" else "")
        case "ratio":
            return f"{plain(value)}x"
        case _:
            return plain(value)


def interval(value: float, low: float, high: float, unit: str = "") -> str:
    """A value and its interval, "0.31 [0.29, 0.33]"; the value alone where low equals high or there is no interval."""
    text = number(value, unit)
    if math.isnan(low) or low == high:
        return text
    inner = "" if unit == "ratio" else unit
    return f"{text} [{number(low, inner)}, {number(high, inner)}]"


def place(value: object) -> str:
    """A value of an axis: 16384 as 16K, 3e-4 as it is, text as text."""
    if not isinstance(value, Real):
        return str(value)
    exact = float(value)
    if exact >= 1024 and exact % 1024 == 0:
        return f"{exact / 1024:.0f}K"
    return f"{exact:.0f}" if exact.is_integer() and abs(exact) < 1e6 else plain(exact)


def plain(value: float) -> str:
    """Three figures that matter, without an exponent where it can be avoided."""
    return mark(_plain(float(value)), sources_of(value))


def _plain(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        rounded = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return rounded.replace("-0", "0") if float(rounded) == 0 else rounded
    return f"{value:.2e}"


def _scaled(value: float, step: int, names: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= step and power < len(names) - 1:
        value, power = value / step, power + 1
    return f"{plain(value)} {names[power]}".rstrip()
