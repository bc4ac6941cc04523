"""Every number in generated prose is a reference, or was declared beforehand; the build fails on any other.

A reference is a span of `Prose` with its sources, each of which must be there: the id of a record in records.jsonl, a
line of the training log, or a function of this repository. Declared is what no measurement can change: a number in the
page's own words (question, arms, limits, claims), a number of seeds, a constant that the study's rule or answer names,
and a value of an axis where the text says so: beside the axis's name or unit ("2048 tokens", "on 4 / 8 / 16 ranks").

Checked are a page's answers and warning and the answers of its verdicts, as finished sentences, so that it does not
matter how a number got into them. Not checked: what counts records and lines (other machines, what was left out, the
notes of tables), places in captions, and cells of tables, which carry their ids themselves.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

from markupsafe import Markup, escape

from ablations.code import ROOT, definitions_reached
from ablations.study import Study
from ablations.traced import Prose, Sources
from bench.record import Record
from reports.numbers import UNITS, place

# Part of a word (fp16, 1F1B, V3, zero_bubble_h1), of a version (2.13.0) or of a power (n^2), digits are no number.
_NUMERAL = re.compile(r"(?<![\w.^])([+-]?\d+(?:,\d{3})*(?:\.(\d+))?(?:e[+-]?\d+)?)(K|x|%)?(?!\w|\.\d)")
_RECORD = re.compile(r"[0-9a-f]{12}")
_LINE = re.compile(r"(.+\.jsonl):(\d+)")
_ABOUT = re.compile(r", \w+=$")  # before the value of an axis in the words of NoEvidence
_LISTED = r"[\d.,]*\d[K%x]?"
_BETWEEN = r"(?: / |, | and | or | to )"
_BEFORE = re.compile(rf"(\w+)[ =](?:{_LISTED}{_BETWEEN})*$")
_AFTER = re.compile(rf"(?:{_BETWEEN}{_LISTED})* (\w+)")


@dataclass(frozen=True)
class Numeral:
    """A number as it stands in a text, at [start, end): its value, and how many decimals it shows."""

    start: int
    end: int
    value: float
    decimals: int
    percent: bool

    def shows(self, number: float) -> bool:
        """Whether this is how the number is written, whole or rounded to two figures or more."""
        scaled = 100 * number if self.percent else number
        rounded = round(scaled, self.decimals) == self.value and (self.decimals > 0 or abs(self.value) >= 10)
        return scaled == self.value or abs(scaled - self.value) < 1e-9 * abs(scaled) or rounded


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What no measurement can change: numbers that need no word beside them, and by axis the values that do."""

    numbers: frozenset[float] = frozenset()
    axes: Mapping[str, frozenset[float]] = field(default_factory=dict)

    def has(self, numeral: Numeral, prose: str) -> bool:
        """Whether the number, which stands in this text, is one of them."""
        axes = [name for name, values in self.axes.items() if any(map(numeral.shows, values))]
        return any(map(numeral.shows, self.numbers)) or any(_said_to_be_on(axis, numeral, prose) for axis in axes)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a reference leads to: its number on the page, and for each point, line or function what it is and the
    ids.
    """

    number: int
    points: tuple[tuple[str, tuple[str, ...]], ...]


def numerals(text: str) -> Iterator[Numeral]:
    """The numbers that stand in a text."""
    for found in _NUMERAL.finditer(text):
        value = float(found[1].replace(",", "")) * (1024 if found[3] == "K" else 1)
        yield Numeral(found.start(), found.end(), value, len(found[2] or ""), percent=found[3] == "%")


def declared(study: Study, records: Iterable[Record]) -> Declared:
    """The numbers that the study has set before any measurement: axes, seeds, and constants of its rules and answer."""
    points = [record.axes for record in records]
    points += [cell.axes for profile in study.seeds for cell in study.cells(profile)]
    axes: dict[str, set[float]] = {}
    for name, value in (pair for axes_of_one in points for pair in axes_of_one.items()):
        if isinstance(value, int | float):
            axes.setdefault(name, set()).add(float(value))
    judging: list[Callable[..., object]] = [rule.judge for rule in study.rules]
    judging += [study.answer] if study.answer else []
    constants = {number for function in judging for number in _constants(function)}
    seeds = {float(seeds) for seeds in (*study.seeds.values(), *(rule.seeds for rule in study.rules))}
    # Lengths that are measured stand in a constant too: as everything on an axis they need their word.
    alone = constants - set().union(*axes.values()) | seeds
    return Declared(numbers=frozenset(alone), axes={name: frozenset(values) for name, values in axes.items()})


def unreferenced(prose: str, words: Iterable[str], known: Declared, *, pending: bool = False) -> list[str]:
    """The numbers of a text that are neither references nor written in the words nor declared; of a pending one the
    axes of what is missing, `, length=512`, are left out.
    """
    spans = prose.references if isinstance(prose, Prose) else ()
    written = {(numeral.value, numeral.percent) for text in words for numeral in numerals(text)}
    written |= {(value / 100, False) for value, percent in written if percent}
    return [
        prose[numeral.start : numeral.end]
        for numeral in numerals(prose)
        if not any(span.start <= numeral.start and numeral.end <= span.end for span in spans)
        and (numeral.value, numeral.percent) not in written
        and not known.has(numeral, prose)
        and not (pending and _ABOUT.search(prose[: numeral.start]))
    ]


def check(page: str, prose: str, words: Iterable[str], known: Declared, *, pending: bool = False) -> None:
    """Fail where a number of a page's sentence has no reference.

    Raises:
        ValueError: names the page, the sentence and the number.
    """
    missing = unreferenced(prose, words, known, pending=pending)
    if missing:
        raise ValueError(
            f"page={page!r}: {', '.join(missing)} in {str(prose)!r} has no reference: write the number of an Estimate "
            "or a traced record into the sentence itself, or declare it: a constant of the study, a claim, or an axis "
            "whose name or unit stands beside it"
        )


def numbered(prose: Iterable[str]) -> dict[Sources, int]:
    """Every set of sources that the texts refer to, once, with its number on the page from 1."""
    found = (span.sources for text in prose if isinstance(text, Prose) for span in text.references)
    return {sources: number for number, sources in enumerate(dict.fromkeys(found), start=1)}


def cited(prose: str, numbers: Mapping[Sources, int]) -> Markup:
    """The text with a link at every number that has sources."""
    parts, at = list[Markup](), 0
    for span in prose.references if isinstance(prose, Prose) else ():
        parts += [escape(prose[at : span.start])]
        parts += [
            Markup('<a class="ref" href="#ref-{}">{}</a>').format(numbers[span.sources], prose[span.start : span.end])
        ]
        at = span.end
    return Markup("").join([*parts, escape(prose[at:])])


def attribute(cell: str) -> Markup:
    """The ids behind a table's cell, as an attribute of its tag; nothing for a cell without any."""
    spans = cell.references if isinstance(cell, Prose) else ()
    sources = sorted(frozenset().union(*(span.sources for span in spans)))
    return Markup(' data-records="{}"').format(" ".join(sources)) if sources else Markup()


def entries(numbers: Mapping[Sources, int], records: Iterable[Record], folder: Path) -> list[Entry]:
    """What each number of a reference leads to.

    Raises:
        ValueError: a source that is not there.
    """
    by_id = {record.id: record for record in records}
    return [Entry(number=number, points=_points(sources, by_id, folder)) for sources, number in numbers.items()]


def _points(sources: Sources, by_id: Mapping[str, Record], folder: Path) -> tuple[tuple[str, tuple[str, ...]], ...]:
    points: dict[str, list[str]] = {}
    for source in sorted(sources, key=lambda name: (_order(by_id.get(name)), name)):
        record = by_id.get(source)
        if record is not None:
            points.setdefault(point(record), []).append(source)
        else:
            points.setdefault(_elsewhere(source, folder), [])
    return tuple((words, tuple(ids)) for words, ids in points.items())


def point(record: Record) -> str:
    """What a record is about, in words: study, arm, metric, place."""
    where = ", ".join(f"{name} {place(value)}" for name, value in sorted(record.axes.items()))
    return f"{record.study}: {record.arm}, {record.metric}{f' at {where}' if where else ''}"


def _order(record: Record | None) -> tuple[object, ...]:
    if record is None:
        return ("",)
    axes = sorted((name, float(v) if isinstance(v, int | float) else 0.0, str(v)) for name, v in record.axes.items())
    return record.study, record.arm, record.metric, axes, -1 if record.seed is None else record.seed


def _elsewhere(source: str, folder: Path) -> str:
    """A source that is no record, in words, once it is sure to be there."""
    line = _LINE.fullmatch(source)
    if line is not None:
        path, number = folder / line[1], int(line[2])
        if path.is_file() and number <= len(path.read_bytes().split(b"\n")):
            return f"{line[1]}, line {number}"
    elif not _RECORD.fullmatch(source) and _defines(source):
        return f"by arithmetic: {source}"
    raise ValueError(f"source={source!r}: no such record, line of a log or function; a reference must lead somewhere")


@cache
def _defines(name: str) -> bool:
    """Whether a module of this repository defines the name, `package.module.name`."""
    module, _, own = name.rpartition(".")
    base = ROOT.joinpath(*module.split("."))
    paths = [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return any(own == getattr(node, "name", None) for path in paths for node in ast.parse(path.read_text()).body)


def _said_to_be_on(axis: str, numeral: Numeral, prose: str) -> bool:
    """Whether the axis's name or unit stands beside the number, or beside the list that it is in."""
    beside = _BEFORE.search(prose[: numeral.start]), _AFTER.match(prose[numeral.end :])
    return any(_singular(found[1]) in map(_singular, (axis, UNITS.get(axis, axis))) for found in beside if found)


def _singular(word: str) -> str:
    return word.lower().removesuffix("s")


def _constants(function: Callable[..., object]) -> set[float]:
    """The numbers that names of the function's file stand for, of those that it uses."""
    names = {part.id for node in definitions_reached(function) for part in ast.walk(node) if isinstance(part, ast.Name)}
    known: Mapping[str, object] = getattr(function, "__globals__", {})
    return {number for name in names for number in _numbers(known.get(name))}


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float | Fraction) and not isinstance(value, bool):
        yield float(value)
    elif isinstance(value, Mapping):
        yield from _numbers((*value.keys(), *value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from (number for part in value for number in _numbers(part))
