"""Configs as JSON and back, and a digest that names a config.

A value of a union carries the name of its variant under "kind", so that a file reads without the code. Unknown or
missing names are errors: a setting that silently falls back to a default is a run nobody meant.
"""

import json
from dataclasses import fields, is_dataclass
from hashlib import sha256
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dsv3.config.rules import field_names
from dsv3.config.whole import Config


def to_json(config: Any) -> str:
    """The config as JSON text, fields in the order they are written."""
    return json.dumps(_plain(config), indent=2)


def from_json(text: str, kind: Any = Config) -> Any:
    """Read back what `to_json` wrote; the result equals the original.

    Raises:
        ValueError: text that is not JSON, an unknown or missing field or variant, or a value that the config refuses.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config text is not JSON ({error}); it should be what to_json wrote") from error
    return _build(kind, plain, getattr(kind, "__name__", str(kind)))


def digest(config: Any) -> str:
    """Twelve hexadecimal digits that name the config's content: equal configs have equal digests in every process."""
    canonical = json.dumps(_plain(config), sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {name: _plain(getattr(value, name)) for name in field_names(value)}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # Yarn(factor=40) and Yarn(factor=40.0) are equal, so they read and digest alike
    return value


def _build(kind: Any, plain: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _build_union(get_args(kind), plain, path)
    if origin is tuple:
        if not isinstance(plain, list):
            raise ValueError(f"{path}={plain!r}: must be a list")
        return tuple(_build(get_args(kind)[0], part, f"{path}[{i}]") for i, part in enumerate(plain))
    if is_dataclass(kind):
        return _build_config(kind, plain, path)
    return _build_scalar((kind,), plain, path)


def _build_union(options: tuple[Any, ...], plain: Any, path: str) -> Any:
    if isinstance(plain, dict):
        named = {option.__name__: option for option in options if isinstance(option, type) and is_dataclass(option)}
        if plain.get("kind") not in named:
            raise ValueError(f"{path}.kind={plain.get('kind')!r}: must be one of {', '.join(named)}")
        return _build(named[plain["kind"]], plain, path)
    if plain is None and NoneType in options:
        return None
    return _build_scalar(tuple(option for option in options if not is_dataclass(option)), plain, path)


def _build_config(kind: Any, plain: Any, path: str) -> Any:
    if not isinstance(plain, dict):
        raise ValueError(f"{path}={plain!r}: must be an object with the fields of {kind.__name__}")
    given = {name: value for name, value in plain.items() if name != "kind"}
    known = {field.name for field in fields(kind)}
    for name in sorted(given.keys() ^ known):
        raise ValueError(f"{path}.{name}: {'unknown field' if name in given else 'missing field'} of {kind.__name__}")
    hints = get_type_hints(kind)
    return kind(**{name: _build(hints[name], value, f"{path}.{name}") for name, value in given.items()})


def _build_scalar(allowed: tuple[Any, ...], plain: Any, path: str) -> Any:
    for option in allowed:
        if get_origin(option) is Literal and plain in get_args(option):
            return plain
        if option is float and isinstance(plain, int) and not isinstance(plain, bool) and int not in allowed:
            return float(plain)
        if isinstance(option, type) and type(plain) is option:
            return plain
    listed = " or ".join(getattr(option, "__name__", str(option)) for option in allowed)
    raise ValueError(f"{path}={plain!r}: must be {listed}")
