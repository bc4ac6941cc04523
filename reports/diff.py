"""What changed between two runs: the machines first, then every point that both measured, then what only one has.

An exact figure has changed if it differs at any seed that both have. A noisy one has changed if the two 95% intervals
have nothing in common. Chance alone does that to one figure in 180 or so (z or t intervals, at any number of
replicates; to fewer where both runs read the same seeds): of many points some differ though nothing has changed, and
`by_chance` says how many. Where an interval is missing nothing can be said, nor where it is that of one process, since
another process of the same code often lies outside it. Of each folder what speaks is compared (`bench.machines`); where
two machines speak, only figures that transfer between machines are.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ablations.evidence import Estimate, summarise
from bench.fingerprint import saved
from bench.machines import other_machines, speaker, speaking, transfers
from bench.record import Record, load
from reports.known import known

Verdict = Literal["changed", "same", "no interval", "one process", "gone", "new"]
Key = tuple[str, str, str, str, tuple[tuple[str, Any], ...]]
Seeds = dict[int | None, Record]
BY_CHANCE = 1 / 180  # of pairs of 95% intervals: |z| > 2 x 1.96 / sqrt(2)

_PASSING = ("time", "load", "steal_share", "revision", "corpus")  # of a fingerprint: not the machine's


@dataclass(frozen=True)
class Change:
    """A point of two runs; `before` or `after` is None where only one has measured it, `noisy` says whether intervals
    decided.
    """

    study: str
    arm: str
    metric: str
    axes: Mapping[str, Any]
    before: Estimate | None
    after: Estimate | None
    verdict: Verdict
    noisy: bool


@dataclass(frozen=True)
class Diff:
    """Two runs side by side. `machines`: what differs in their fingerprints, (name, before, after); `notes`: what
    of the folders was left out, and why.
    """

    machines: tuple[tuple[str, Any, Any], ...]
    revisions: tuple[str, str]
    points: tuple[Change, ...]
    left_out: int
    notes: tuple[str, ...] = ()

    @property
    def by_chance(self) -> str:
        """How many points chance alone would show as changed, in words; "" where none was decided by intervals."""
        noisy = sum(point.noisy for point in self.points)
        return f"about {BY_CHANCE * noisy:.1g} of {noisy} noisy points differ by chance" if noisy else ""


def diff(before: Path, after: Path) -> Diff:
    """Compare the records of two folders.

    Raises:
        ValueError: a folder without records.
    """
    (old, left_before), (new, left_after) = (_speaking(folder) for folder in (before, after))
    machines = tuple(_unequal(_machine(before, old), _machine(after, new)))
    elsewhere = speaker(old) != speaker(new)
    points, theirs = _points(old), _points(new)
    keys = sorted(points.keys() | theirs.keys(), key=str)
    changes = [_change(key, points.get(key, {}), theirs.get(key, {})) for key in keys]
    kept = tuple(change for change in changes if not elsewhere or transfers(change.metric))
    revisions = old[-1].revision, new[-1].revision
    return Diff(machines, revisions, kept, len(changes) - len(kept), (*left_before, *left_after))


def _speaking(folder: Path) -> tuple[tuple[Record, ...], list[str]]:
    """The records that speak for a folder, and in a sentence each which do not."""
    found = load(folder / "records.jsonl")
    records, strange = known(found.records)
    if not records:
        raise ValueError(
            f"folder={str(folder)!r}: holds no records.jsonl with records; give the --out of a run. "
            f"{found.left_out}{strange}"
        )
    notes = [f"{folder}: {note}" for note in (found.left_out, strange, other_machines(records)) if note]
    return speaking(records), notes


def _machine(folder: Path, records: tuple[Record, ...]) -> dict[str, Any]:
    name = speaker(records)
    assert name is not None, "there are records"
    return {"machine": name} | saved(folder, name)


def _unequal(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted((before.keys() | after.keys()) - set(_PASSING)):
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def _points(records: Iterable[Record]) -> dict[Key, Seeds]:
    """Each point's newest record by seed."""
    newest: dict[Key, Seeds] = {}
    for row in records:
        if row.error is None:
            key = (row.study, row.arm, row.metric, row.profile, tuple(sorted(row.axes.items())))
            newest.setdefault(key, {})[row.seed] = row
    return newest


def _change(key: Key, before: Seeds, after: Seeds) -> Change:
    study, arm, name, _, axes = key
    old, new = (summarise(list(rows.values())) if rows else None for rows in (before, after))
    exact = _exact_verdict(before, after)
    verdict = exact or _noisy_verdict(old, new)
    noisy = exact is None and verdict in ("changed", "same")
    return Change(study, arm, name, dict(axes), old, new, verdict, noisy)


def _exact_verdict(before: Seeds, after: Seeds) -> Verdict | None:
    """The verdict on a point that only one run has, or that is exact at every seed that both have."""
    if not before or not after:
        return "gone" if before else "new"
    shared = before.keys() & after.keys()
    if shared and all(rows[seed].noise == "exact" for rows in (before, after) for seed in shared):
        return "changed" if any(before[seed].value != after[seed].value for seed in shared) else "same"
    return None


def _noisy_verdict(old: Estimate | None, new: Estimate | None) -> Verdict:
    assert old is not None, "both runs have the point"
    assert new is not None, "both runs have the point"
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return "no interval"
    if 1 in (old.n, new.n):
        return "one process"
    return "changed" if old.high < new.low or new.high < old.low else "same"
