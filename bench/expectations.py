"""What the gate expects: expectations.json, what a run found, and what was accepted since another revision.

    {key: {"reason": why, "figures": {case: {figure: value}}, "dearer": {work: {"change": 0.012, "dispatched": 2100}}}}

`key` says what the figures depend on. `dearer` is about instructions, of which none are stored: how much more a piece
of work was accepted to take than at the base of that run, as a share of the total and in dispatch. It holds for bases
that do not have the entry yet, up to that size and the margins; accept with --base where later runs will compare with
an older revision than this one did.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.differences import Figures
from bench.instructions import Rise
from dsv3.config.rules import require

EXPECTATIONS = Path(__file__).parent / "expectations.json"
Stored = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run found on which key: figures, and the work that takes more instructions than at the base."""

    key: str
    figures: Figures
    dearer: Mapping[str, Rise] = field(default_factory=dict)


def load_expectations(path: Path) -> Stored:
    """The entries by key; none where there is no file.

    Raises:
        ValueError: a file that holds something else.
    """
    if not path.exists():
        return {}
    stored = _table(path, "expectations", 'an object with "figures" for each key', "restore it with git checkout")
    for key, entry in stored.items():
        whole = isinstance(entry, dict) and isinstance(entry.get("figures"), dict) and _rises(entry) is not None
        require(whole, path.name, key, 'must hold "figures" and "dearer"', "restore it with git checkout")
    return stored


def load_found(path: Path) -> Found:
    """What `save` wrote, here or on another machine.

    Raises:
        ValueError: there is no such file, or it is no such one.
    """
    remedy = "give a file that python -m bench.gate --save FILE wrote"
    require(path.is_file(), "accept_from", str(path), "must be a file", remedy)
    given = _table(path, "accept_from", 'an object with "key", "figures" and "dearer"', remedy)
    rises = _rises(given)
    whole = isinstance(given.get("key"), str) and isinstance(given.get("figures"), dict) and rises is not None
    require(whole, "accept_from", str(path), 'must hold "key", "figures" and "dearer"', remedy)
    return Found(key=given["key"], figures=given["figures"], dearer=rises or {})


def save(path: Path, found: Found) -> None:
    """Keep what was found."""
    write(path, asdict(found))


def accept(path: Path, stored: Stored, found: Found, reason: str) -> None:
    """Make what was found the expectation of its key."""
    write(path, {**stored, found.key: {"reason": reason, **{k: v for k, v in asdict(found).items() if k != "key"}}})


def accepted_since(stored: Stored, base: Stored) -> dict[str, tuple[Rise, str]]:
    """Work that entries which the base's expectations do not have accept to be dearer: by how much, and why."""
    found: dict[str, tuple[Rise, str]] = {}
    for entry in (entry for key, entry in stored.items() if base.get(key) != entry):
        for work, rise in (_rises(entry) or {}).items():
            before = found[work][0] if work in found else Rise()
            found[work] = (rise.or_more(before), entry["reason"])
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def _table(path: Path, name: str, rule: str, remedy: str) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}={str(path)!r}: must be {rule}, but cannot be read ({error}); {remedy}") from error
    require(isinstance(table, dict), name, str(path), f"must be {rule}", remedy)
    return dict(table)


def _rises(entry: Mapping[str, Any]) -> dict[str, Rise] | None:
    try:
        return {work: Rise(**rise) for work, rise in entry.get("dearer", {}).items()}
    except (TypeError, AttributeError):
        return None
