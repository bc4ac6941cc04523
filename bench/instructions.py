"""Instructions of the gate's work: another revision's dsv3 against the working tree's, in one job and toolchain.

callgrind (valgrind) counts what the processor would execute, whatever the machine's load. The counts depend on the
compiler, the libraries and the instruction set that valgrind offers, so none is stored: both sides are counted side by
side, each in a process with a fixed address layout (`setarch -R`), hash seed and one thread. Equal code then counts
equal, but for a process in ten or so that is 0.02% apart; why has not been found. Other code lies elsewhere in memory,
where it hashes and aligns differently, which moves the total by up to 0.2%, but not what runs in torch's dispatcher,
bindings and allocator. So a row is dearer than the base

    in total       by more than MARGIN, 0.5%
    in dispatch    by more than DISPATCH_MARGIN instructions in the libraries DISPATCH; one torch.empty(0) takes 2,000

Fewer instructions are no failure, as no stored number goes stale: they are printed. More are one, unless an expectation
that was accepted since the base, with a reason, allows that row so much more; beyond it the same margins hold. Work
that the base's dsv3 cannot do is not comparable.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.instrumented import EVERYTHING
from bench.revision import ROOT, checked_out, environment, resolve

MARGIN = 0.005
DISPATCH = ("libc10.so", "libtorch_python.so")
DISPATCH_MARGIN = 1000
PATIENCE = 1800.0  # seconds for one process; alone it takes under two minutes
NEEDED = {
    "valgrind": "apt-get install valgrind",
    "vgdb": "it comes with valgrind",
    "setarch": "it comes with util-linux",
    "git": "apt-get install git",
}


@dataclass(frozen=True)
class Count:
    """Instructions of one piece of work, and those of them in torch's dispatcher, bindings and allocator."""

    total: int
    dispatch: int


@dataclass(frozen=True)
class Counts:
    """What one process counted, by work; why the rest has no count; and for which instruction set."""

    instruction_set: str
    by_work: dict[str, Count]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Rise:
    """How much more a piece of work takes: a share of the total, instructions in dispatch; or it cannot be done."""

    change: float = 0.0
    dispatched: int = 0
    gone: bool = False

    def or_more(self, other: "Rise") -> "Rise":
        """The larger of both in each respect."""
        larger = (max(self.change, other.change), max(self.dispatched, other.dispatched))
        return Rise(*larger, gone=self.gone or other.gone)

    def __str__(self) -> str:
        return "its loss" if self.gone else f"{self.change:+.3%}, dispatch {self.dispatched:+,}"


NOTHING = Rise()


@dataclass(frozen=True)
class Row:
    """One piece of work on both sides; None where there is no count, and then why."""

    work: str
    base: Count | None
    found: Count | None
    reason: str = ""

    @property
    def change(self) -> float:
        """Of the total, relative to the base; 0 where one side has no count."""
        return self.found.total / self.base.total - 1 if self.base and self.found else 0.0

    @property
    def dispatched(self) -> int:
        """More or fewer instructions in dispatch."""
        return self.found.dispatch - self.base.dispatch if self.base and self.found else 0

    @property
    def rise(self) -> Rise:
        """How much more it takes."""
        gone = self.base is not None and self.found is None
        return Rise(max(self.change, 0.0), max(self.dispatched, 0), gone)

    def beyond(self, accepted: Rise) -> bool:
        """Whether it takes more than what was accepted and the margins allow, or cannot be done any more."""
        change, dispatched = self.change - accepted.change, self.dispatched - accepted.dispatched
        return (self.rise.gone and not accepted.gone) or change > MARGIN or dispatched > DISPATCH_MARGIN

    @property
    def dearer(self) -> bool:
        """Whether it takes more than the margins allow, or cannot be done any more."""
        return self.beyond(NOTHING)

    @property
    def cheaper(self) -> bool:
        """Whether it takes less than the margins allow, and is not dearer in any way."""
        return not self.dearer and (self.change < -MARGIN or self.dispatched < -DISPATCH_MARGIN)

    def __str__(self) -> str:
        if not (self.base and self.found):
            side = "the working tree" if self.found is None else "the base"
            return f"{self.work}: not comparable, {side} cannot do it: {self.reason}"
        verdict = "dearer" if self.dearer else "cheaper" if self.cheaper else "within the margins"
        totals = f"{self.base.total:,} -> {self.found.total:,} ({self.change:+.3%})"
        return f"{self.work}: {totals}, dispatch {self.dispatched:+,}: {verdict}"


@dataclass(frozen=True)
class Comparison:
    """All rows, against which commit, and for which instruction set."""

    base: str
    instruction_set: str
    rows: tuple[Row, ...]

    @property
    def dearer(self) -> dict[str, Rise]:
        """The work that takes more than the margins allow, and how much more."""
        return {row.work: row.rise for row in self.rows if row.dearer}

    def beyond(self, accepted: Mapping[str, Rise]) -> list[str]:
        """The work that takes more than what was accepted of it and the margins allow."""
        return [row.work for row in self.rows if row.beyond(accepted.get(row.work, NOTHING))]

    def __str__(self) -> str:
        told = [row for row in self.rows if row.dearer or row.cheaper or not (row.base and row.found)]
        quiet = [row for row in self.rows if row not in told]
        far = max((abs(row.change) for row in quiet), default=0.0)
        rest = f"{len(quiet)} of {len(self.rows)} pieces of work within the margins (at most {far:.3%} apart)"
        return "\n  ".join((f"{rest} of {self.base[:9]}, {self.instruction_set} in valgrind", *map(str, told)))


def json_at(commit: str, path: str) -> dict[str, Any]:
    """A JSON file as that commit has it; empty where it has none."""
    shown = subprocess.run(("git", "show", f"{commit}:{path}"), cwd=ROOT, capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(shown.stdout) if shown.returncode == 0 else {}
    return found


def why_not() -> str | None:
    """None where instructions can be counted; otherwise what is missing and how to get it."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        return "; ".join(f"no {name} ({NEEDED[name]})" for name in missing)
    fixed = subprocess.run((*_fixed_layout(), "true"), capture_output=True, text=True, check=False)
    if fixed.returncode:
        return f"the address layout cannot be fixed here: {fixed.stderr.strip()}"
    import torch

    if not torch._C._valgrind_supported_platform():
        return "this build of torch cannot talk to valgrind"
    return None


def default_base() -> str:
    """HEAD where dsv3/ or bench/ differ from it, otherwise the commit before."""
    status = subprocess.run(
        ("git", "status", "--porcelain", "--", "dsv3", "bench"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    return "HEAD" if status.stdout.strip() else "HEAD~1"


@contextmanager
def comparing(base: str, work: Iterable[str] = ()) -> Iterator[Callable[[], Comparison]]:
    """Both sides being counted while the caller does something else; calling what is given waits for the comparison.

    Raises:
        ValueError: there is no such revision.
    """
    with (
        checked_out(base) as whole,
        copied(whole) as old,
        copied(ROOT) as new,
        started(old, work) as counts_of_base,
        started(new, work) as counts_of_tree,
    ):
        yield lambda: Comparison(resolve(base), *joined(counts_of_base(), counts_of_tree()))


def joined(base: Counts, tree: Counts) -> tuple[str, tuple[Row, ...]]:
    """The instruction set, and a row for each piece of work that the working tree has."""
    rows = []
    for work in sorted(tree.by_work.keys() | tree.reasons.keys()):
        old, new = base.by_work.get(work), tree.by_work.get(work)
        reasons = base.reasons if old is None else tree.reasons
        rows.append(Row(work, old, new, reasons.get(work, reasons.get(EVERYTHING, ""))))
    return tree.instruction_set, tuple(rows)


@contextmanager
def copied(source: Path) -> Iterator[Path]:
    """A copy of dsv3/ and bench/ and nothing else: even the names of neighbouring files move memory when listed."""
    with TemporaryDirectory(prefix="dsv3-counted-") as folder:
        for house in ("dsv3", "bench"):
            shutil.copytree(source / house, Path(folder) / house, ignore=shutil.ignore_patterns("__pycache__"))
        yield Path(folder)


@contextmanager
def started(tree: Path, work: Iterable[str] = ()) -> Iterator[Callable[[], Counts]]:
    """A process that counts with that tree's dsv3; calling what is given waits for its counts."""
    with TemporaryDirectory(prefix="dsv3-counts-") as folder:
        # Of what is imported nothing is written down, or the second side would find it and lay out memory otherwise.
        fixed = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(command(work), env=environment(tree) | fixed, cwd=folder, stdout=log, stderr=log)
        try:
            yield lambda: collect(process, Path(folder))
        finally:
            process.kill()
            process.wait()


def command(work: Iterable[str]) -> tuple[str, ...]:
    """The command line of one counting process, which answers into the folder where it runs."""
    callgrind = (
        "--tool=callgrind",
        "--instr-atstart=no",
        "--collect-atstart=no",
        "--callgrind-out-file=counts",
    )
    # Names without the folder's: a string of other letters hashes elsewhere, and so makes other work.
    worker = (sys.executable, "-m", "bench.instrumented", "answer.json", *work)
    return (*_fixed_layout(), "valgrind", *callgrind, *worker)


def collect(process: "subprocess.Popen[bytes]", folder: Path) -> Counts:
    """Wait for the process and read what it counted.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    code = process.wait(PATIENCE)
    if code:
        said = (folder / "log").read_text().strip().splitlines()[-5:]
        raise RuntimeError(f"counting instructions ended with exit code {code}: " + " | ".join(said))
    told = json.loads((folder / "answer.json").read_text())
    # callgrind numbers its output by mark, from 1
    counts = {work: read(folder / f"counts.{mark}") for mark, work in enumerate(told["counted"], start=1)}
    return Counts(told["instruction_set"], counts, told["reasons"])


def read(output: Path) -> Count:
    """The count in one of callgrind's output files.

    An object is named in full once, "ob=(3) /usr/lib/libm.so", and then "ob=(3)"; lines of cost that follow are its
    own, position first and count last, but for the one after "calls=", which repeats what the called function took.
    """
    text = output.read_text()
    announced = re.search(r"^totals: (\d+)$", text, flags=re.MULTILINE)
    assert announced, f"{output.name} is callgrind's"
    names: dict[str, str] = {}
    costs: Counter[str] = Counter()
    here, called = "", False
    for line in text.splitlines():
        if named := re.match(r"c?ob=\((\d+)\)(?: (.*))?$", line):
            if named[2]:
                names[named[1]] = Path(named[2]).name
            here = here if line.startswith("c") else names[named[1]]
        elif line.startswith("calls="):
            called = True
        elif re.match(r"[-+*\d]", line):
            costs[here] += 0 if called else int(line.split()[-1])
            called = False
    assert costs.total() == int(announced[1]), f"the costs in {output.name} add up to what it announces"
    return Count(costs.total(), sum(costs[name] for name in DISPATCH))


def _fixed_layout() -> tuple[str, ...]:
    return ("setarch", platform.machine(), "--addr-no-randomize")
