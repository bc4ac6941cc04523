"""Which cells are done, so that none runs twice.

A cell is named by everything its result depends on: the study's name and rule, its arm, seed, axes and configs, the
profile, the machine (with its Python and torch), and the code that its measuring reaches. When it has run,
`<out>/cells/<key>.json` lists the ids of its records; it is done while `<out>/records.jsonl` holds them all. Records
are on disk before the list is, so a kill at any instant costs at most the cell in work.
"""

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from ablations.code import code_digest
from ablations.study import Cell, Study
from bench.fingerprint import machine_id
from bench.record import Profile, Record, load
from dsv3.config import digest


def cell_key(study: Study, cell: Cell, profile: Profile) -> str:
    """Sixteen hexadecimal digits that name a cell by everything its result depends on."""
    arms = study.arms if cell.arm is None else (study.arm(cell.arm),)
    parts = {
        "study": study.name,
        "rule": study.rule_digest(),
        "code": code_digest(study.measure),
        "machine": machine_id(),
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
    path = out / "cells" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"records": [record.id for record in records], "seconds": round(seconds, 2)}))
    temporary.replace(path)


def done(out: Path) -> frozenset[str]:
    """The keys of the cells that are done."""
    there = {record.id for record in load(out / "records.jsonl").records}
    marks = sorted((out / "cells").glob("*.json"))
    return frozenset(path.stem for path in marks if (ids := _marked(path)) is not None and ids <= there)


def _marked(path: Path) -> frozenset[str] | None:
    """The ids that a mark lists; None of one that a power cut left unreadable: its cell runs again."""
    try:
        return frozenset(json.loads(path.read_text())["records"])
    except (ValueError, KeyError, TypeError):
        return None
