"""Carry the records of finished cells over a change of code that changes no figure.

The name of a cell holds a digest of the code that it reaches, so an edit asks for every cell anew, also one that
computes the same. Adopting spares that where it can be shown: of each group of cells that differ in their seed alone,
one is measured again, and every figure that the seed determines (counts, losses) must be the recorded one bit for bit.
Then the new names of all finished cells of the group point at the old records, which keep their ids, revision and time,
and a line per cell in `<out>/adoptions.jsonl` says why. One figure that differs, and nothing of the study is adopted.

A time cannot be shown to be the same. Cells that hold one are left to be run again unless `times` asks for them, and
then their lines say so. Not adopted at all are records under another rule of verdict and, of cells that measure times,
those of another machine.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ablations.cache import Mark, cell_key, mark, marks
from ablations.cell import PENDING
from ablations.run import label, remaining, run
from ablations.study import Cell, Study
from bench.fingerprint import machine_id, revision, utc_now
from bench.metrics import metric
from bench.record import Profile, Record, append_lines, load
from dsv3.config.rules import require

Point = tuple[str, str, tuple[tuple[str, Any], ...]]  # arm, metric, axes: what a cell of any seed has in common
Found = Mapping[Point, Record]


class Differs(Exception):
    """A figure that the seed determines is no longer the recorded one."""


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What was done: the cells measured again and those whose records were carried over, and how many were left to be
    run: for holding times, or for lack of records.
    """

    measured: tuple[Cell, ...]
    carried: tuple[Cell, ...]
    timed: int
    missing: int


def adopt(
    name: str,
    study: Study,
    profile: Profile,
    out: Path,
    *,
    reason: str,
    times: bool = False,
    device: str = "cpu",
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> Adopted:
    """Carry over what can be shown to be unchanged; `name` is the study as `catalogue.load` knows it.

    Raises:
        Differs: a figure differs; nothing was adopted.
        ValueError: no reason is given, or a cell that ran before cannot be run now.
    """
    require(reason.strip() != "", "reason", reason, "must be text", "say why the change leaves the figures alone")
    cells = tuple(replace(cell, device=device) for cell in study.cells(profile))
    left, known = remaining(study, profile, out, device).left, marks(out)
    recorded = _by_cell(study, profile, cells, load(out / "records.jsonl").records)
    there = [at for at, cell in enumerate(cells) if recorded[at] and cell in left]
    wanted = [at for at in there if times or not any(map(_is_time, recorded[at].values()))]
    groups = _groups(cells, wanted)
    samples = tuple(cells[group[0]] for group in groups)
    fresh = _measured_again(name, study, cells, samples, profile, on_cell)
    for group in groups:
        _check(cells[group[0]], recorded[group[0]], fresh[group[0]])
    carried = [at for group in groups for at in group if _alike(recorded[at], fresh[group[0]])]
    _carry(study, profile, out, [(cells[at], recorded[at]) for at in carried], known, reason, samples)
    return Adopted(
        measured=samples,
        carried=tuple(cells[at] for at in carried),
        timed=len(there) - len(wanted),
        missing=len(left) - len(there) + len(wanted) - len(carried),
    )


def _by_cell(study: Study, profile: Profile, cells: Sequence[Cell], records: Sequence[Record]) -> list[Found]:
    """For each cell, the newest record of each of its points; of a failure none."""
    found: list[dict[Point, Record]] = [{} for _ in cells]
    rule, machine = study.rule_digest(), machine_id()
    for row in records:
        ours = (row.study, row.profile, row.rule) == (study.name, profile, rule)
        if ours and (row.error is None or row.error.startswith(PENDING)):
            here = [at for at, cell in enumerate(cells) if row.machine == machine or not cell.timed]
            owners = [at for at in here if _owns(cells[at], row)]
            if owners:  # the axes of one cell may be a part of another's: the record is that of the fuller one
                at = max(owners, key=lambda at: len(cells[at].axes))
                found[at][row.arm, row.metric, tuple(sorted(row.axes.items()))] = row
    return list(found)


def _owns(cell: Cell, row: Record) -> bool:
    axes = {"device": cell.device} | dict(cell.axes)
    return row.seed == cell.seed and cell.arm in (None, row.arm) and axes.items() <= row.axes.items()


def _is_time(row: Record) -> bool:
    known = metric(row.metric)
    return known.noise != "exact" and not known.transfers


def _groups(cells: Sequence[Cell], chosen: Sequence[int]) -> list[list[int]]:
    """The chosen cells by what they are beside their seed."""
    groups: dict[str, list[int]] = {}
    for at in chosen:
        groups.setdefault(json.dumps([cells[at].arm, dict(cells[at].axes)], sort_keys=True), []).append(at)
    return list(groups.values())


def _measured_again(
    name: str,
    study: Study,
    cells: Sequence[Cell],
    samples: tuple[Cell, ...],
    profile: Profile,
    on_cell: Callable[[Cell], None],
) -> list[Found]:
    with TemporaryDirectory() as folder:
        wrong = [said for said in run(name, study, samples, profile, Path(folder), on_cell) if said]
        require(not wrong, "cells", wrong[:1], "must run as they did before", "mend them, or run the study anew")
        return _by_cell(study, profile, cells, load(Path(folder, "records.jsonl")).records)


def _check(cell: Cell, recorded: Found, again: Found) -> None:
    """Raises Differs at the first point that only one of both has, or whose figure, config or text is another."""
    for point in sorted(recorded.keys() | again.keys()):
        old, new = recorded.get(point), again.get(point)
        where = " ".join([point[0], point[1], *(f"{axis}={value}" for axis, value in point[2])])
        if old is None or new is None:
            raise Differs(f"{label(cell)}: {where} is {'new' if old is None else 'no longer measured'}")
        for part in ("config", "corpus") if _is_time(old) else ("config", "corpus", "error", "value"):
            before, now = getattr(old, part), getattr(new, part)
            if before != now or type(before) is not type(now):
                raise Differs(f"{label(cell)}: {part} of {where} was {before!r} and is {now!r}")


def _alike(recorded: Found, again: Found) -> bool:
    """Whether another seed of the group has the same points, of the same configs and text."""
    return recorded.keys() == again.keys() and all(
        (row.config, row.corpus) == (again[point].config, again[point].corpus) for point, row in recorded.items()
    )


def _carry(
    study: Study,
    profile: Profile,
    out: Path,
    carried: Sequence[tuple[Cell, Found]],
    known: Sequence[Mark],
    reason: str,
    samples: Sequence[Cell],
) -> None:
    by_records = {before.records: before for before in known}
    lines, renamed = [], list[tuple[str, Found, float]]()
    for cell, rows in carried:
        before = by_records.get(frozenset(row.id for row in rows.values()))
        key = cell_key(study, cell, profile)
        renamed.append((key, rows, before.seconds if before else 0.0))
        line = {
            "study": study.name,
            "cell": label(cell),
            "reason": reason,
            "old": before.cell if before else None,
            "new": key,
            "revision": revision(),
            "measured_again": cell in samples,
            "times": any(_is_time(row) for row in rows.values()),
            "time": utc_now(),
        }
        lines.append(json.dumps(line, sort_keys=True) + "\n")
    if lines:
        append_lines(out / "adoptions.jsonl", "".join(lines))
    for key, rows, seconds in renamed:
        mark(out, key, rows.values(), seconds)
