"""What changed between two runs: the machines first, then every point that both measured, then what only one has.

An exact figure has changed if it differs. A noisy one has changed if the two 95% intervals have nothing in common,
which chance alone does to about 1 point in 150; where an interval is missing nothing can be said. On two machines only
figures that transfer between machines are compared.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ablations.evidence import Estimate, summarise
from bench.metrics import metric
from bench.record import Record, load

Verdict = Literal["changed", "same", "no interval"]
Key = tuple[str, str, str, tuple[tuple[str, Any], ...]]

_PASSING = ("time", "load", "steal_share", "revision", "corpus")  # of a fingerprint: not the machine's


@dataclass(frozen=True)
class Change:
    """A point of two runs; `before` or `after` is None where only one has measured it."""

    study: str
    arm: str
    metric: str
    axes: Mapping[str, Any]
    before: Estimate | None
    after: Estimate | None

    @property
    def verdict(self) -> Verdict | Literal["gone", "new"]:
        """What happened to the point."""
        if self.before is None or self.after is None:
            return "new" if self.before is None else "gone"
        ours, theirs = (self.before.low, self.before.high), (self.after.low, self.after.high)
        if None in ours or None in theirs:
            return "no interval"
        apart = ours[1] < theirs[0] or theirs[1] < ours[0]  # type: ignore[operator]
        return "changed" if apart else "same"


@dataclass(frozen=True)
class Diff:
    """Two runs side by side. `machines`: what differs in their fingerprints, (name, before, after)."""

    machines: tuple[tuple[str, Any, Any], ...]
    revisions: tuple[str, str]
    points: tuple[Change, ...]
    left_out: int


def diff(before: Path, after: Path) -> Diff:
    """Compare the records of two folders.

    Raises:
        ValueError: a folder without records.
    """
    old, new = (_records(folder) for folder in (before, after))
    machines = tuple(_unequal(_fingerprint(before, old), _fingerprint(after, new)))
    elsewhere = old[-1].machine != new[-1].machine
    points, theirs = _points(old), _points(new)
    changes = [_change(key, points.get(key), theirs.get(key)) for key in sorted(points.keys() | theirs.keys(), key=str)]
    kept = tuple(change for change in changes if not elsewhere or metric(change.metric).transfers)
    return Diff(machines, (old[-1].revision, new[-1].revision), kept, len(changes) - len(kept))


def _records(folder: Path) -> tuple[Record, ...]:
    found = load(folder / "records.jsonl").records
    if not found:
        raise ValueError(f"folder={str(folder)!r}: holds no records.jsonl with records; give the --out of a run")
    return found


def _fingerprint(folder: Path, records: tuple[Record, ...]) -> dict[str, Any]:
    path = folder / "machines" / f"{records[-1].machine}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"machine": records[-1].machine}
    return found


def _unequal(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted((before.keys() | after.keys()) - set(_PASSING)):
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def _points(records: Iterable[Record]) -> dict[Key, Estimate]:
    """Each point's estimate over its seeds, of every seed the newest record."""
    newest: dict[Key, dict[int | None, Record]] = {}
    for row in records:
        if row.error is None:
            key = (row.study, row.arm, row.metric, tuple(sorted(row.axes.items())))
            newest.setdefault(key, {})[row.seed] = row
    return {key: summarise(list(rows.values())) for key, rows in newest.items()}


def _change(key: Key, before: Estimate | None, after: Estimate | None) -> Change:
    study, arm, name, axes = key
    return Change(study, arm, name, dict(axes), before, after)
