"""The blocks of one comparison in a file that only grows, so that a run that was killed goes on where it was.

A file is named after both sides, `<out>/ab/<base>-<head>.jsonl`: the commit, and a digest of what the working tree's
dsv3/ and bench/ hold. A line is a block, on disk before the next begins. Lines of another machine or other cases are
left alone; lines that are no block are named and counted.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from shutil import copytree, ignore_patterns
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.ab.block import Block
from bench.ab.decide import Ratios
from bench.ab.turns import ARMS, SLOWED
from bench.record import Skipped, append_lines
from bench.revision import ROOT, checked_out
from dsv3.config.rules import require

SCHEMA = 2  # 1 had the seconds of single calls


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What must agree for blocks to be put together: both sides, the machine and the cases in their order."""

    base: str
    head: str
    machine: str
    cases: tuple[str, ...]

    def path(self, out: Path) -> Path:
        """The file of its blocks."""
        return out / "ab" / f"{self.base[:12]}-{self.head[:12]}.jsonl"


@contextmanager
def trees(revision: str) -> Iterator[dict[str, Path]]:
    """A folder for each arm: the revision's dsv3 and a copy of the working tree's, both with the same bench.

    The copy is what is measured, whatever is edited meanwhile, and lies in a folder whose name is as long.

    Raises:
        ValueError: the revision does not exist, or is from before there was a dsv3, in whose place today's would run.
    """
    with checked_out(revision) as base, TemporaryDirectory(prefix="dsv3-revision-") as folder:
        there = (base / "dsv3" / "__init__.py").exists()
        require(there, "revision", revision, "must hold dsv3/__init__.py", "choose a later one")
        head = Path(folder) / "tree"
        copytree(ROOT / "dsv3", head / "dsv3", ignore=ignore_patterns("__pycache__"))
        copytree(base / "bench", head / "bench", ignore=ignore_patterns("__pycache__"))
        yield {"base": base, "head": head, "control": base}


def content(tree: Path) -> str:
    """A digest of the files of a tree's dsv3 and bench."""
    digest = sha256()
    for path in sorted(path for room in ("dsv3", "bench") for path in (tree / room).rglob("*") if path.is_file()):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(tree)}\n".encode() + sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def append(out: Path, comparison: Comparison, block: Block) -> None:
    """Add a block to the file of its comparison, whole or not at all."""
    line = json.dumps({"schema": SCHEMA} | asdict(comparison) | asdict(block), sort_keys=True, allow_nan=False)
    append_lines(comparison.path(out), line + "\n")


def load(out: Path, comparison: Comparison) -> tuple[list[Block], list[Skipped]]:
    """The blocks of this comparison in the order of their measuring, and the lines that are none, with reasons."""
    path = comparison.path(out)
    blocks, skipped = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), start=1):
        if not line.strip():
            continue
        try:
            blocks.append(read(json.loads(line), comparison))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            skipped.append(Skipped(line=number, reason=f"{type(error).__name__}: {error}"))
    return blocks, skipped


def read(line: Mapping[str, Any], comparison: Comparison) -> Block:
    """The block of a line.

    Raises:
        ValueError: the line belongs to another comparison, is of another schema, or holds what no clock shows.
        KeyError, TypeError, AttributeError: it is no block at all.
    """
    if line["schema"] != SCHEMA:
        raise ValueError(f"schema={line['schema']!r}: this dsv3 reads {SCHEMA}")
    for name, ours in asdict(comparison).items():
        theirs = tuple(line[name]) if name == "cases" else line[name]
        if theirs != ours:
            raise ValueError(f"{name}={theirs!r}: not of this comparison, whose {name} is {ours!r}")
    seconds = line["seconds"]
    if set(seconds) | set(line["unable"]) != set(comparison.cases):
        raise ValueError("must hold every case, as seconds or as a reason")
    for case, arms in seconds.items():
        for arm in (*ARMS, *SLOWED):
            fine = len(arms[arm]) == len(arms["base"]) > 0 and all(0 < taken < math.inf for taken in arms[arm])
            if not fine:
                raise ValueError(f"{case} {arm}: must be positive seconds, as many as the base has")
    return Block(seconds=seconds, unable=line["unable"], took=line["took"], load=line["load"], time=line["time"])


def ratio(arms: Mapping[str, Sequence[float]], arm: str) -> float:
    """The median over turns of an arm's seconds to the base's: turns beside each other see the same machine."""
    return median(ours / theirs for ours, theirs in zip(arms[arm], arms["base"], strict=True))


def ratios(blocks: Sequence[Block], arm: str) -> Ratios:
    """An arm's ratio to the base in each block, by case; cases that the base could not serve are left out."""
    able = [case for case in blocks[0].seconds if all(case in block.seconds for block in blocks)] if blocks else []
    return {case: [ratio(block.seconds[case], arm) for block in blocks] for case in able}


def unable(blocks: Sequence[Block]) -> dict[str, str]:
    """The cases that are not comparable, and why."""
    return {case: why for block in blocks for case, why in block.unable.items()}
