"""Run a study: each cell in a fresh process, once.

Cells that measure no time run side by side on a CPU, a core for each; the others one after another, because a neighbour
would stand in their timings. A cell that fails leaves error records and the rest goes on; it is tried again by the next
run.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import compress
from operator import not_
from pathlib import Path

from ablations.cache import cell_key, done
from ablations.cell import READINGS_FAILED, order, to_record
from ablations.code import ROOT
from ablations.study import Cell, Reading, Study
from bench.fingerprint import cores, provenance
from bench.record import Profile, append

_PATIENCE = 20  # times the expected seconds before a cell counts as hung, on a machine that may be slow and shared
_START = 120  # seconds that importing torch may take on top
_ABREAST = 8  # cells at most side by side: each is a process with torch in it and a model


@dataclass(frozen=True, kw_only=True)
class Left:
    """The cells of a study under a profile: how many there are, and which are still to be run."""

    cells: int
    left: tuple[Cell, ...]

    @property
    def hours(self) -> float:
        """What the cells that are left are expected to take, one after another."""
        return sum(cell.seconds for cell in self.left) / 3600


def remaining(study: Study, profile: Profile, out: Path, device: str = "cpu") -> Left:
    """Which cells of the study are still to be run into that folder."""
    cells = tuple(replace(cell, device=device) for cell in study.cells(profile))
    already = done(out)
    return Left(cells=len(cells), left=tuple(cell for cell in cells if cell_key(study, cell, profile) not in already))


def run(
    name: str, study: Study, cells: tuple[Cell, ...], profile: Profile, out: Path, on_cell: Callable[[Cell], None]
) -> Iterator[str]:
    """Run the cells; yields, one by one, what went wrong with each ("" for nothing).

    Args:
        on_cell: called with each cell as it starts, from several threads.
        name: the study as `catalogue.load` knows it, since the cell's process loads it anew.
    """

    stopping = threading.Event()

    def run_one(cell: Cell) -> str:
        on_cell(cell)
        limit = patience(cell)
        status, said = in_fresh_process(order(name, cell, profile, out), limit, stopping)
        return settle(study, cell, profile, out, status, said)

    alone = [cell.timed or cell.device != "cpu" for cell in cells]
    with ThreadPoolExecutor(min(cores(), _ABREAST)) as pool:
        try:
            yield from pool.map(run_one, compress(cells, map(not_, alone)))
        except BaseException:
            stopping.set()
            raise
    yield from map(run_one, compress(cells, alone))


def patience(cell: Cell) -> float:
    """Seconds after which the cell's process is given up."""
    return _START + _PATIENCE * cell.seconds


def settle(study: Study, cell: Cell, profile: Profile, out: Path, status: int, said: str) -> str:
    """What went wrong with a cell whose process ended so; error records where it could not leave any itself."""
    if status == -signal.SIGINT:
        return ""  # the user's doing, and no failure of the cell
    if status not in (0, READINGS_FAILED):
        if cell_key(study, cell, profile) in done(out):
            return ""  # it had written everything when it was killed
        said = said or f"the process ended with status {status}"
        _record_failure(study, cell, profile, out, said.splitlines()[-1])
    return f"{label(cell)}: {said}" if status else ""


def label(cell: Cell) -> str:
    """A cell in a few words: its arm, axes and seed."""
    axes = [f"{name}={value}" for name, value in cell.axes.items()]
    return " ".join([*([cell.arm] if cell.arm else []), *axes, *([] if cell.seed is None else [f"seed={cell.seed}"])])


def in_fresh_process(text: str, limit: float, stopping: threading.Event) -> tuple[int, str]:
    """The exit status of the process of the cell in the order `text`, and what it printed; the last line says what
    ended it.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            (sys.executable, "-m", "ablations.cell"),
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert process.stdin is not None, "a pipe was asked for"
        ended = ""
        with process, process.stdin:
            try:
                with suppress(BrokenPipeError):  # it died before it could listen: its status and its last words say why
                    process.stdin.write(text + "\n")
                    process.stdin.flush()
                status = _wait(process, limit, stopping)
                ended = f"killed by {signal.Signals(-status).name}; out of memory?" if status < 0 else ""
            except subprocess.TimeoutExpired:
                ended = f"gave up after {limit:.0f} s; declare more seconds for this cell, or a smaller one"
                status = -signal.SIGKILL
            finally:
                process.kill()
        said.seek(0)
        return status, f"{said.read()}\n{ended}".strip()


def _wait(process: "subprocess.Popen[str]", limit: float, stopping: threading.Event) -> int:
    """Its exit status; as if interrupted, when `stopping` is set first.

    Raises:
        subprocess.TimeoutExpired: it runs longer than `limit` seconds.
    """
    end = time.monotonic() + limit
    while not stopping.is_set():
        try:
            return process.wait(min(1.0, limit))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                raise
    return -signal.SIGINT


def _record_failure(study: Study, cell: Cell, profile: Profile, out: Path, reason: str) -> None:
    arms = [arm.name for arm in study.arms] if cell.arm is None else [cell.arm]
    readings = [Reading(arm=arm, metric=study.metrics[0], failed=reason) for arm in arms]
    where, rule = provenance(profile), study.rule_digest()
    append(out / "records.jsonl", [to_record(study, cell, reading, where, rule) for reading in readings])
