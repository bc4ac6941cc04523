"""Numbers that know the records they come from, and text that still knows it once they are written into it.

    Record.value --tracing--> Traced --arithmetic, Estimate--> Traced --f"{x:.2f}"--> marked text --Prose--> text, spans

A judge or an answer is plain code over floats that writes its numbers into a sentence, so the trace travels in the
values: a traced float keeps its sources through + - * / // % **, abs, round, min and max, and writes itself between
marks of Unicode's private use area, from which `Prose` recovers the sentence and the sources of each of its numbers.

math, numpy and float() make plain floats and drop the trace. What `Estimate.map` and `mean` are given gets it back;
`mean` of numbers that lost theirs takes the records that were read directly (`replicates`) since the last such mean.

A source is the id of a record, a line of a log (`train/log.jsonl:12`), or the function of this repository that a number
follows from by arithmetic (`dsv3.model.cost.flops_per_token`). Outside `tracing` nothing is marked: records carry plain
numbers, and so does what is made of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

from bench.record import Record

Sources = frozenset[str]

NONE: Sources = frozenset()
_OPEN, _THEN, _CLOSE = "\ue000", "\ue001", "\ue002"
_TEXT = f"[^{_OPEN}{_THEN}{_CLOSE}]*"
_MARKED = re.compile(f"{_OPEN}({_TEXT}){_THEN}({_TEXT}){_CLOSE}(%?)")  # the percent sign is part of the number


@dataclass(frozen=True)
class Reference:
    """A span of a text, [start, end), and the sources of the number that stands there."""

    start: int
    end: int
    sources: Sources


class Prose(str):
    """Plain text that knows the sources of its numbers: prints, compares and joins as the text it is."""

    references: tuple[Reference, ...]

    def __new__(cls, text: str, references: Iterable[Reference] = ()) -> "Prose":
        """Plain text, and where its references stand in it."""
        prose = super().__new__(cls, text)
        prose.references = tuple(references)
        return prose

    @classmethod
    def of(cls, marked: str) -> "Prose":
        """The text without its marks, and what they said.

        Raises:
            ValueError: a mark that was cut apart after its number had been written.
        """
        if isinstance(marked, cls):
            return marked
        plain, references, at = "", [], 0
        for found in _MARKED.finditer(marked):
            plain += marked[at : found.start()]
            number = found[2] + found[3]
            references.append(Reference(len(plain), len(plain) + len(number), frozenset(found[1].split())))
            plain, at = plain + number, found.end()
        plain += marked[at:]
        if any(mark in plain for mark in (_OPEN, _THEN, _CLOSE)):
            raise ValueError(f"answer={plain!r}: a traced number was cut apart; write numbers into the sentence whole")
        return cls(plain, references)


class Traced(float):
    """A float with its sources."""

    sources: Sources

    def __new__(cls, value: float, sources: Iterable[str]) -> "Traced":
        """The value, from these sources alone."""
        traced = super().__new__(cls, value)
        traced.sources = frozenset(sources)
        return traced

    def __format__(self, spec: str) -> str:
        return mark(format(float(self), spec), self.sources)

    def __str__(self) -> str:
        return format(self, "")

    def __round__(self, digits: SupportsIndex | None = None) -> Any:
        return carry(round(float(self)) if digits is None else round(float(self), digits), self.sources)


class Count(int):
    """A whole number with its sources; what is computed from it is a plain int."""

    sources: Sources

    def __new__(cls, value: int, sources: Iterable[str]) -> "Count":
        """The value, from these sources alone."""
        count = super().__new__(cls, value)
        count.sources = frozenset(sources)
        return count

    def __format__(self, spec: str) -> str:
        return mark(format(int(self), spec), self.sources)

    def __str__(self) -> str:
        return format(self, "")


def _following(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation on floats, whose result has the sources of all operands."""

    def follow(*operands: Any) -> Any:
        result = operation(*operands)
        return carry(result, sources_of(*operands)) if isinstance(result, float) else result

    return follow


for _name in ("neg", "pos", "abs", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        if hasattr(float, _side):
            setattr(Traced, _side, _following(getattr(float, _side)))


def sources_of(*values: object) -> Sources:
    """The sources of all the values together; none of plain ones."""
    return NONE.union(*(getattr(value, "sources", NONE) for value in values))


def carry(value: Any, sources: Sources) -> Any:
    """The number with these sources beside its own; a plain one stays plain where there are none."""
    every = sources | sources_of(value)
    if not every or value is None:
        return value
    return Traced(value, every) if isinstance(value, float) else Count(value, every)


def mark(text: str, sources: Iterable[str]) -> str:
    """The text between marks that name its sources; the bare text where there are none."""
    names = sorted(sources)
    return f"{_OPEN}{' '.join(names)}{_THEN}{text}{_CLOSE}" if names else text


@dataclass
class _Reads:
    """What a judge read directly since its last mean of plain numbers, and before."""

    fresh: Sources = NONE
    before: Sources = NONE


_reads: ContextVar[_Reads | None] = ContextVar("reads", default=None)


@contextmanager
def tracing(records: Iterable[Record]) -> Iterator[tuple[Record, ...]]:
    """The records, their values traced to their ids, for as long as something is computed from them."""
    token = _reads.set(_Reads())
    try:
        yield tuple(
            record if record.value is None else replace(record, value=Traced(record.value, (record.id,)))
            for record in records
        )
    finally:
        _reads.reset(token)


def note_read(records: Iterable[Record]) -> None:
    """Say that a judge took these records whole, to compute from their values by itself."""
    reads = _reads.get()
    if reads is not None:
        reads.fresh |= sources_of(*(record.value for record in records))


def claim_reads() -> Sources:
    """The sources of what was read directly and not claimed before; of the last claim where nothing was read since."""
    reads = _reads.get()
    if reads is None:
        return NONE
    reads.before, reads.fresh = reads.fresh or reads.before, NONE
    return reads.before
