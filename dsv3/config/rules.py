"""One way to refuse a bad value: say what it is, which rule it breaks and what to do about it."""

from dataclasses import fields, is_dataclass
from typing import Any


def require(holds: bool, name: str, value: object, rule: str, remedy: str) -> None:
    """Raise `ValueError("name=value: rule; remedy")` unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}; {remedy}")


def require_positive(config: Any, *names: str) -> None:
    """Each named field is a whole number of at least 1."""
    require_whole(config, *names, low=1)


def require_whole(config: Any, *names: str, low: int) -> None:
    """Each named field is a whole number of at least `low`."""
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        rule, remedy = f"must be a whole number of at least {low}", f"set {name} to {low} or more"
        require(whole and value >= low, name, value, rule, remedy)


def require_number(config: Any, name: str, *, low: float, high: float = float("inf"), above: bool = False) -> None:
    """The named field is finite and lies in [low, high], or in (low, high] when `above`."""
    value = getattr(config, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != float("inf")
    holds = number and (low < value if above else low <= value) and value <= high
    left = f"> {low:g}" if above else f">= {low:g}"
    rule = f"must be a finite number {left}" + ("" if high == float("inf") else f" and <= {high:g}")
    require(holds, name, value, rule, f"choose {name} inside that range")


def require_one_of(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """The named field is one of the listed words."""
    value = getattr(config, name)
    require(value in choices, name, value, f"must be one of {', '.join(choices)}", "pick one of these")


def require_kind(config: Any, name: str, kinds: tuple[type, ...]) -> None:
    """The named field is an instance of one of the variants of its union."""
    value = getattr(config, name)
    listed = ", ".join(kind.__name__ for kind in kinds)
    require(isinstance(value, kinds), name, value, f"must be one of {listed}", f"pass e.g. {kinds[0].__name__}(...)")


def field_names(config: Any) -> tuple[str, ...]:
    """The fields of a config dataclass, in the order they are written."""
    assert is_dataclass(config), f"{config!r} is not a config"
    return tuple(field.name for field in fields(config))
