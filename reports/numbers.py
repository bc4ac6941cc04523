"""How numbers and intervals are written: three figures that matter, the unit's own scale, and what is not known left
out. A traced number keeps its sources in what is written.
"""

import math
from numbers import Real

from ablations.traced import mark, sources_of

UNITS = {"length": "tokens"}  # of axes whose name does not say it
_SPELT = {
    "cpu": "CPU",
    "cv": "CV",
    "gpu": "GPU",
    "flops": "FLOPs",
    "kv": "KV",
    "mfu": "MFU",
    "moe": "MoE",
    "mtp": "MTP",
    "sqnr": "SQNR",
}
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
            return _scaled(value, 1000, _COUNTS) if abs(value) >= 1e6 else plain(value)


def interval(value: float, low: float, high: float, unit: str = "") -> str:
    """A value and its interval, "0.31 [0.29, 0.33]"; the value alone where low equals high or there is no interval. A
    unit that all three have is said once, "2.5 [2, 3] MiB".
    """
    text = number(value, unit)
    if math.isnan(low) or low == high:
        return text
    inner = "" if unit == "ratio" else unit
    ends = number(low, inner), number(high, inner)
    scale = text.partition(" ")[2]
    if scale and all(end.endswith(f" {scale}") for end in ends):
        value_alone, *alone = (part.removesuffix(f" {scale}") for part in (text, *ends))
        return f"{value_alone} [{', '.join(alone)}] {scale}"
    return f"{text} [{', '.join(ends)}]"


def place(value: object) -> str:
    """A value of an axis: 16384 as 16K, 14.8e12 as 14.8 T, 3e-4 as it is, text as text."""
    if not isinstance(value, Real):
        return str(value)
    exact = float(value)
    if exact >= 1e8:
        return _scaled(exact, 1000, _COUNTS)
    if exact >= 1024 and exact % 1024 == 0:
        return f"{exact / 1024:.0f}K"
    return f"{exact:.0f}" if exact.is_integer() and abs(exact) < 1e6 else plain(exact)


def spelt(name: str) -> str:
    """A name of the code in words, abbreviations as one writes them: `excess_max_vio` as excess MaxVio."""
    words = name.replace("max_vio", "MaxVio").split("_")
    return " ".join(_SPELT.get(word, word) for word in words)


def with_unit(axis: str) -> str:
    """An axis as a label, with its unit where the name does not say it."""
    return f"{axis} ({UNITS[axis]})" if axis in UNITS else axis


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
