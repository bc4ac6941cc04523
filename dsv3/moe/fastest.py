"""Which dispatch is the fastest on a CPU: a committed table, so that the choice is never timed and always the same.

`fastest.toml` has, per instruction set of the C++ kernel, number format, direction and rows of an average expert, the
CPU time of each dispatch over that of `looped`, and the one to take; `python -m bench.fastest` says how it is measured
and writes it. An entry holds from its number of rows to that of the next one, the first from none on.
"""

import functools
import tomllib
from pathlib import Path
from typing import Any, Literal

import torch

TABLE = Path(__file__).with_name("fastest.toml")
WITHOUT = "none"  # in the place of an instruction set, where the C++ kernel cannot be
Direction = Literal["forward", "training"]
Name = Literal["kernel", "grouped", "looped"]


def fastest(instructions: str, dtype: torch.dtype, direction: Direction, rows: float) -> Name:
    """The dispatch to take; `looped` for a format or instructions that are not in the table."""
    found: Name = "looped"
    for least, name in entries(instructions, str(dtype).removeprefix("torch."), direction):
        if rows >= least:
            found = name
    return found


def in_words(instructions: str, dtype: torch.dtype, direction: Direction) -> str:
    """What `fastest` takes for any rows: the dispatch of few, then from how many on which other one."""
    found: list[tuple[int, Name]] = [(0, fastest(instructions, dtype, direction, 0))]
    for rows, name in entries(instructions, str(dtype).removeprefix("torch."), direction):
        if name != found[-1][1]:
            found.append((rows, name))
    (_, first), *later = found
    return f"{first} ({', '.join(f'{name} from {rows} rows' for rows, name in later)})" if later else first


@torch.compiler.assume_constant_result  # the compiler runs it and keeps the answer
def entries(instructions: str, dtype: str, direction: str) -> tuple[tuple[int, Name], ...]:
    """From how many rows on which dispatch is taken, ascending; the first from 0 on."""
    return _entries(instructions, dtype, direction)


@functools.cache
def _entries(instructions: str, dtype: str, direction: str) -> tuple[tuple[int, Name], ...]:
    asked = (instructions, dtype, direction)
    found = [row for row in table() if (row["instructions"], row["dtype"], row["direction"]) == asked]
    found.sort(key=lambda row: int(row["rows"]))
    return tuple((row["rows"] if place else 0, row["fastest"]) for place, row in enumerate(found))


def table() -> list[dict[str, Any]]:
    """The entries as they stand in the file."""
    found: list[dict[str, Any]] = tomllib.loads(TABLE.read_text())["measured"]
    return found
