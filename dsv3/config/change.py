"""Derive a config from another by naming what changes: `vary(tiny(), **{"model.moe.capacity": Fixed(factor=1.2)})`."""

from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from dsv3.config.rules import field_names

T = TypeVar("T")


def vary(config: T, /, **changes: Any) -> T:
    """A copy of `config` with the named fields changed; a name may be a path through nested configs, with dots.

    Fields of one parent change together, so that two values that are only valid as a pair can be set in one call.

    Raises:
        ValueError: for a field that does not exist (with the nearest names), or a value that the config refuses.
    """
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        _check_field(config, head, path)
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            here[head] = value
    for head, nested in below.items():
        here[head] = vary(here.get(head, getattr(config, head)), **nested)
    return replace(config, **here)  # type: ignore[type-var]


def _check_field(config: Any, name: str, path: str) -> None:
    if not is_dataclass(config):
        raise ValueError(f"{path}: {config!r} has no fields; set the whole value instead")
    names = field_names(config)
    if name not in names:
        near = get_close_matches(name, names, n=3) or names
        raise ValueError(f"{path}: {type(config).__name__} has no field {name!r}; did you mean {', '.join(near)}?")
