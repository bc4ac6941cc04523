"""What tests of the gate have in common: figures, rows of instructions, and counts given instead of counted.

Classes of `bench.instructions` are looked up when they are used: the mutations run that module anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from bench import instructions

FIGURES: dict[str, dict[str, Any]] = {
    "base": {"peak_bytes": 100, "operators": {"aten.mm.default": 7}},
    "plan_gpipe": {"bubble_slots": 36.0},
}


def with_peak(found: int) -> dict[str, dict[str, Any]]:
    """FIGURES with another peak."""
    return {**FIGURES, "base": {**FIGURES["base"], "peak_bytes": found}}


def row(work: str, found: int, dispatch: int = 0) -> instructions.Row:
    """A piece of work that took 1,000,000 instructions at the base, 100,000 of them in dispatch."""
    return instructions.Row(work, instructions.Count(1_000_000, 100_000), instructions.Count(found, 100_000 + dispatch))


def counting(monkeypatch: pytest.MonkeyPatch, *answers: instructions.Comparison | Exception) -> list[tuple[str, ...]]:
    """Have instructions counted, or not, as given, one answer after the other; which work was asked for each time."""
    asked: list[tuple[str, ...]] = []
    left = iter(answers)

    @contextmanager
    def comparing(base: str, work: tuple[str, ...] = ()) -> Iterator[Callable[[], instructions.Comparison]]:
        asked.append(tuple(work))
        answer = next(left)

        def counted() -> instructions.Comparison:
            if isinstance(answer, Exception):
                raise answer
            return replace(answer, rows=tuple(row for row in answer.rows if row.work in work or not work))

        yield counted

    monkeypatch.setattr(instructions, "comparing", comparing)
    monkeypatch.setattr(instructions, "why_not", lambda: None)
    return asked
