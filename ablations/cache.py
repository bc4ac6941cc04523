"""Which cells are done, so that none runs twice.

A cell is named by everything its result depends on: the study's name and rule, its arm, seed, axes and configs, the
profile, the code that its measuring reaches, and where it measures times, the machine (with its Python and torch):
counts and losses hold on any, so that several machines can share the seeds of a study. When it has run, a line of
`<out>/cells.jsonl` lists the ids of its records; it is done while `<out>/records.jsonl` holds them all. Both files
only grow and are kept together, so that a copy of the folder knows its cells as done.

Each cell's process writes its own records, and its line after them, as it ends. A kill at any instant costs at most the
cells in work, one for each process that was killed: one where cells run one after another, as many as run side by side
where they measure no time.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ablations.code import code_digest
from ablations.study import Cell, Study
from bench.fingerprint import machine_id
from bench.record import Profile, Record, append_lines, load
from dsv3.config import digest


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A cell that has run: its name, the ids of its records, and the seconds it took."""

    cell: str
    records: frozenset[str]
    seconds: float


def cell_key(study: Study, cell: Cell, profile: Profile) -> str:
    """Sixteen hexadecimal digits that name a cell by everything its result depends on."""
    arms = study.arms if cell.arm is None else (study.arm(cell.arm),)
    parts = {
        "study": study.name,
        "rule": study.rule_digest(),
        "code": code_digest(study.measure),
        "machine": machine_id() if cell.timed else None,
        "profile": profile,
        "device": cell.device,
        "arm": cell.arm,
        "seed": cell.seed,
        "axes": dict(cell.axes),
        "configs": {arm.name: None if arm.config is None else digest(arm.config) for arm in arms},
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def mark(out: Path, key: str, records: Iterable[Record], seconds: float) -> None:
    """Note that a cell has run: its records, which are on disk already, and how long it took."""
    plain = {"cell": key, "records": [record.id for record in records], "seconds": round(seconds, 2)}
    append_lines(out / "cells.jsonl", json.dumps(plain) + "\n")


def marks(out: Path) -> tuple[Mark, ...]:
    """The cells that have run, in file order. A line that cannot be read is left out: its cell runs again."""
    path = out / "cells.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return tuple(found for line in lines if (found := _mark(line)) is not None)


def done(out: Path) -> frozenset[str]:
    """The names of the cells that are done."""
    there = {record.id for record in load(out / "records.jsonl").records}
    return frozenset(mark.cell for mark in marks(out) if mark.records <= there)


def _mark(line: bytes) -> Mark | None:
    try:
        plain = json.loads(line)
        return Mark(cell=plain["cell"], records=frozenset(plain["records"]), seconds=float(plain["seconds"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
