"""Whether the gate's figures repeat: in fresh processes side by side, and over all runs so far.

A figure that is not exact must be mended or dropped, so `python -m bench.gate --repeat 20` measures everything in 20
fresh processes, each with hash seeds and addresses of its own where structure is counted and with fixed ones where
instructions are, two at a time, and names each figure that moved. Besides, every run of the gate appends one line to
gate.jsonl, so that how often a re-run disagreed is known for the machine at hand.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.differences import differences, size
from bench.instructions import copied, started, why_not
from bench.record import append_lines
from bench.revision import ROOT, environment

SIDE_BY_SIDE = 2
MEASURE = "import json, sys; from bench.structure import measure; json.dump(measure(), sys.stdout)"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the gate: when (UTC), on which key, of which code, what came out and which figures it was about; and
    which dispatch its experts take there (`dsv3.moe.dispatch.chosen_here`).
    """

    time: str
    key: str
    revision: str
    outcome: str
    figures: tuple[str, ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """All runs that could be read, and how many lines could not."""

    runs: tuple[Run, ...]
    skipped: int

    def __str__(self) -> str:
        unread = f"; {self.skipped} lines could not be read" if self.skipped else ""
        key = self.runs[-1].key if self.runs else ""
        here = [run for run in self.runs if run.key == key]
        unstable = sum(run.outcome == "unstable" for run in here)
        return f"unstable in {unstable} of {len(here)} runs on this key{unread}"


def note(path: Path, run: Run) -> History:
    """Append the run, whole or not at all, and return all runs."""
    append_lines(path, json.dumps(asdict(run)) + "\n")
    return history(path)


def history(path: Path) -> History:
    """The runs in a file."""
    runs, skipped = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            plain = json.loads(line)
            runs.append(Run(**{**plain, "figures": tuple(plain["figures"])}))
        except (ValueError, TypeError, KeyError):
            skipped += 1
    return History(tuple(runs), skipped)


def repeat(times: int) -> dict[str, int]:
    """Measure everything in so many fresh processes and print what is identical; by part, how many figures moved."""
    missing = why_not()
    if missing:
        print(f"instructions: not counted: {missing}")
    with copied(ROOT) as tree, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        parts: dict[str, Callable[[Path], Mapping[str, Any]]] = {"structure": structure_once}
        if not missing:
            parts["instructions"] = instructions_once
        asked = {name: [pool.submit(once, tree) for _ in range(times)] for name, once in parts.items()}
        return {name: said(name, [answer.result() for answer in answers]) for name, answers in asked.items()}


def said(name: str, found: list[Mapping[str, Any]]) -> int:
    """Print in how many processes the figures are those of the first, and which are not; how many moved."""
    moved = [list(differences(found[0], other)) for other in found]
    equal = sum(not changes for changes in moved)
    for where in sorted({change.where for changes in moved for change in changes}):
        print(f"{name}: {where} moved in {sum(where in {c.where for c in changes} for changes in moved)} processes")
    print(f"{name}: {size(found[0])} figures identical in {equal} of {len(found)} fresh processes")
    return len({change.where for changes in moved for change in changes})


def structure_once(tree: Path) -> dict[str, Any]:
    """The structure figures of a fresh process."""
    command = (sys.executable, "-c", MEASURE)
    done = subprocess.run(command, env=environment(tree), cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def instructions_once(tree: Path) -> dict[str, Any]:
    """The instruction counts of a fresh process."""
    with started(tree) as counts:
        return {work: asdict(count) for work, count in counts().by_work.items()}
