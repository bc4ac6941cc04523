"""Whether a report says what its records say, derived anew: every file, the provenance in every figure, every id.

The files are built again in this process and compared byte by byte. Apart from that, so that a difference has a name:
the provenance inside each picture on disk is read back and compared with that of the records as they are now, and every
id that the page on disk mentions is looked up in records.jsonl.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablations.study import Study
from bench.record import load
from reports.build import build, stale
from reports.figures import provenance_in

_IDS = re.compile(r'data-records="([^"]*)"|<code class="ids">([^<]*)</code>')
_RECORD = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was compared, how many of each, and in a sentence each what does not hold."""

    files: int
    figures: int
    references: int
    ids: int
    wrong: tuple[str, ...]


def verify(out: Path, studies: Sequence[Study]) -> Verified:
    """Derive the report in `out` from its records and compare.

    Raises:
        ValueError: records from which no report can be built, such as a number without reference.
    """
    report = build(out, studies)
    page = out / "index.html"
    ids = mentioned(page.read_text()) if page.is_file() else frozenset()
    there = {record.id for record in load(out / "records.jsonl").records}
    wrong = [f"{name}: not the bytes that the records give" for name in stale(out, report.files)]
    wrong += _provenance(out, report.files)
    wrong += [f"index.html: no record has the id {name}" for name in sorted(ids - there)]
    pictures = sum(name.startswith("figures/") for name in report.files)
    return Verified(
        files=len(report.files), figures=pictures, references=report.references, ids=len(ids), wrong=tuple(wrong)
    )


def mentioned(page: str) -> frozenset[str]:
    """The ids of records in a page: of its references and of its tables' cells."""
    return frozenset(name for found in _IDS.finditer(page) for name in _RECORD.findall(found[1] or found[2] or ""))


def _provenance(out: Path, files: Mapping[str, bytes]) -> Iterator[str]:
    """What the pictures on disk say they show, where it is not what the records say now."""
    for name, data in files.items():
        if not name.startswith("figures/") or not (out / name).is_file():
            continue
        try:
            told, now = provenance_in((out / name).read_bytes()), provenance_in(data)
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        changed = [key for key in sorted(told.keys() | now.keys()) if told.get(key) != now.get(key)]
        if changed:
            told_now = ", ".join(f"{key} {told.get(key)} (records: {now.get(key)})" for key in changed)
            yield f"{name}: shows other records: {told_now}"


def summary(found: Verified, report: Path) -> str:
    """The result as a sentence."""
    return (
        f"{report}: {found.files} files built again, {found.figures} pictures with their provenance, "
        f"{found.references} references in prose, {found.ids} ids of records: "
        + (f"{len(found.wrong)} do not hold" if found.wrong else "all as the records say")
    )
