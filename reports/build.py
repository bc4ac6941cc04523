"""From a folder of records to a report: `index.html` (one file, nothing fetched), `report.md` and `figures/`.

The report is a function of the records, the studies and the machines' fingerprints: no date of building, no random
id. So it can be checked by building it again. Every number in its prose is a reference or was declared beforehand
(`reports.references`): there is no report with any other.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ablations.claims import Outcome
from ablations.study import Study
from ablations.traced import Prose
from bench.fingerprint import saved
from bench.metrics import METRICS
from bench.record import Record, load
from reports import budget, references
from reports.known import known
from reports.numbers import spelt
from reports.pages import MARKS, Page, Ruling, bench_page, rulings, stranger_page, study_page
from reports.training import training_page

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report by their path below its folder, the pages they show, how many references their prose has,
    and in a sentence each what was left out of it.
    """

    files: Mapping[str, bytes]
    pages: Sequence[Page]
    references: int
    left_out: Sequence[str]


def build(out: Path, studies: Sequence[Study]) -> Report:
    """The report on the records in `out`; nothing is written.

    Raises:
        ValueError: a number in the prose of a page that is neither a reference nor declared.
    """
    loaded = load(out / "records.jsonl")
    records, strangers = known(loaded.records, studies)
    records, adrift = budget.placed(records)
    ruled = rulings(studies, records)
    training, lost = training_page(out / "train" / "log.jsonl")
    said = (f"records.jsonl: {left}" for left in (loaded.left_out, strangers, adrift) if left)
    left_out = (*said, *filter(None, (lost,)))
    pages = [*([training] if training else []), *_pages(records, studies, ruled)]
    prose = _checked(pages, ruled)
    numbers = references.numbered(prose)
    content = _content(pages, ruled) | {
        "left_out": left_out,
        "machines": _machines(out, records),
        "references": references.entries(numbers, records, out),
    }
    environment = _environment()
    environment.filters["cited"] = lambda text: references.cited(text, numbers)
    files = {
        name: environment.get_template(f"{name}.jinja").render(content).encode() for name in ("index.html", "report.md")
    }
    for page in pages:
        for figure in page.figures:
            files |= {f"figures/{figure.name}.{kind}": data for kind, data in figure.files.items()}
    count = sum(len(text.references) for text in prose)
    return Report(files=files, pages=pages, references=count, left_out=left_out)


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
    """A page per study, also for one that has not run, then one per benchmark file or unknown study; none without any
    record.
    """
    if not records:
        return []
    found = {row.claim.id: row.verdict for row in ruled}
    pages = [study_page(study, records, found) for study in studies]
    pages.append(budget.budget_page(records, found))
    known = {study.name for study in studies} | {budget.STUDY}
    others: dict[str, list[Record]] = {}
    for record in records:
        if record.study not in known:
            others.setdefault(record.study, []).append(record)
    made = {True: bench_page, False: stranger_page}
    return pages + [made[name.startswith("bench_")](name, rows) for name, rows in others.items()]


def _checked(pages: Sequence[Page], ruled: Sequence[Ruling]) -> list[Prose]:
    """The generated prose in the order of the page, every number of it referenced or declared.

    Raises:
        ValueError: a number that is neither.
    """
    prose = []
    for page in pages:
        words = [*page.words, *(word for row in page.rulings for word in row.words)]
        said = [(text, text.startswith("Pending: ")) for text in (*page.answers, page.warning)]
        said += [(row.verdict.answer, row.verdict.outcome is Outcome.PENDING) for row in page.rulings]
        for text, pending in said:
            references.check(page.name, text, words, page.declared, pending=pending)
            prose.append(text)
    shown = {row.claim.id for page in pages for row in page.rulings}
    for row in ruled:
        if row.claim.id not in shown:
            pending = row.verdict.outcome is Outcome.PENDING
            references.check("claims", row.verdict.answer, row.words, references.Declared(), pending=pending)
            prose.append(row.verdict.answer)
    return [text for text in prose if isinstance(text, Prose)]


def _content(pages: Sequence[Page], ruled: Sequence[Ruling]) -> dict[str, Any]:
    counts = Counter(row.verdict.outcome for row in ruled)
    return {
        "style": (_TEMPLATES / "style.css").read_text(),
        "pages": pages,
        "answered": [page for page in pages if page.answers],
        "rulings": ruled,
        "tally": [(outcome, MARKS[outcome], counts[outcome]) for outcome in Outcome if counts[outcome]],
        "glossary": [row for row in METRICS if row.name in {metric.name for page in pages for metric in page.metrics}],
    }


def _machines(out: Path, records: Iterable[Record]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The machines that the records name: each in brief, and its whole fingerprint as facts in words."""
    found = {name: saved(out, name) for name in dict.fromkeys(record.machine for record in records)}
    return [
        (name, _in_brief(facts), [(_key(key), _fact(value)) for key, value in facts.items() if key != "machine"])
        for name, facts in found.items()
    ]


def _in_brief(facts: Mapping[str, Any]) -> str:
    """What one asks of a machine first; "" of a fingerprint that does not say."""
    if not facts.keys() >= {"processor", "cores", "memory_gib", "gpus", "torch"}:
        return ""
    memory = "" if facts["memory_gib"] is None else f"{facts['memory_gib']} GiB"
    gpus = "no GPU" if not facts["gpus"] else _fact(facts["gpus"])
    parts = (_fact(facts["processor"]), f"{facts['cores']} cores", memory, gpus, f"torch {facts['torch']}")
    return ", ".join(filter(None, parts))


def _key(name: str) -> str:
    return name.replace("_gib", " (GiB)").replace("_", " ")


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
    environment.filters["records"] = references.attribute
    environment.filters["spelt"] = spelt
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment
