"""From a folder of records to a report: `index.html` (one file, nothing fetched), `report.md` and `figures/`.

The report is a function of the records, the studies and the machines' fingerprints: no date of building, no random
id. So it can be checked by building it again.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ablations.claims import Outcome
from ablations.study import Study
from bench.metrics import METRICS
from bench.record import Loaded, Record, Skipped, load
from reports.pages import MARKS, Page, Ruling, bench_page, rulings, study_page
from reports.training import training_page

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report by their path below its folder, the pages they show, and the lines that were no records."""

    files: Mapping[str, bytes]
    pages: Sequence[Page]
    skipped: Sequence[Skipped]


def build(out: Path, studies: Sequence[Study]) -> Report:
    """The report on the records in `out`; nothing is written."""
    loaded = load(out / "records.jsonl")
    ruled = rulings(studies, loaded.records)
    training = training_page(out / "train" / "log.jsonl")
    pages = [*([training] if training else []), *_pages(loaded.records, studies, ruled)]
    content = _content(loaded, pages, ruled, _machines(out / "machines", loaded.records))
    environment = _environment()
    files = {
        name: environment.get_template(f"{name}.jinja").render(content).encode() for name in ("index.html", "report.md")
    }
    for page in pages:
        for figure in page.figures:
            files |= {f"figures/{figure.name}.{kind}": data for kind, data in figure.files.items()}
    return Report(files=files, pages=pages, skipped=loaded.skipped)


def write(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the files below `out`, each whole or not at all, and remove figures of studies that are gone."""
    for name, data in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
    for gone in set(_figures(out)) - files.keys():
        (out / gone).unlink()


def stale(out: Path, files: Mapping[str, bytes]) -> list[str]:
    """The files below `out` that are missing, differ from what the records give, or should not be there."""
    differing = [
        name for name, data in files.items() if not (out / name).is_file() or (out / name).read_bytes() != data
    ]
    return differing + [name for name in _figures(out) if name not in files]


def _figures(out: Path) -> list[str]:
    found = [path for kind in ("svg", "png") for path in (out / "figures").glob(f"*.{kind}")]
    return sorted(path.relative_to(out).as_posix() for path in found)


def _pages(records: Sequence[Record], studies: Sequence[Study], ruled: Sequence[Ruling]) -> list[Page]:
    """A page per study, also for one that has not run, then one per benchmark file; none without any record."""
    if not records:
        return []
    found = {row.claim.id: row.verdict for row in ruled}
    pages = [study_page(study, records, found) for study in studies]
    known = {study.name for study in studies}
    others = dict.fromkeys(record.study for record in records if record.study not in known)
    return pages + [bench_page(name, [record for record in records if record.study == name]) for name in others]


def _content(loaded: Loaded, pages: Sequence[Page], ruled: Sequence[Ruling], machines: Sequence[Any]) -> dict[str, Any]:
    counts = Counter(row.verdict.outcome for row in ruled)
    return {
        "style": (_TEMPLATES / "style.css").read_text(),
        "pages": pages,
        "answered": [page for page in pages if page.answers],
        "rulings": ruled,
        "tally": [(outcome, MARKS[outcome], counts[outcome]) for outcome in Outcome if counts[outcome]],
        "machines": machines,
        "skipped": loaded.skipped,
        "glossary": [row for row in METRICS if row.name in {metric.name for page in pages for metric in page.metrics}],
    }


def _machines(folder: Path, records: Iterable[Record]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The fingerprints of the machines that the records name, as facts in words."""
    machines = []
    for name in dict.fromkeys(record.machine for record in records):
        path = folder / f"{name}.json"
        said = json.loads(path.read_text()) if path.is_file() else {"fingerprint": f"missing: no machines/{name}.json"}
        machines.append(
            (name, [(key.replace("_", " "), _fact(value)) for key, value in said.items() if key != "machine"])
        )
    return machines


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_fact, value)) or "none"
    return "not known" if value is None else str(value)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment
