"""The gate: what small pieces of work cost, exactly. Exit code 1 if something costs more.

    python -m bench.gate                               compare
    python -m bench.gate --accept --reason "..."       write what was found as the new expectation, and why
    python -m bench.gate --save FOUND.json             keep what was found, as CI does for a key that you do not have
    python -m bench.gate --accept-from FOUND.json --reason "..."
    python -m bench.gate --repeat 20                   are all figures identical in 20 fresh processes?

Structure (`bench.structure`) is compared with bench/expectations.json, equal both ways: an unexpected saving fails too,
since either it is real, and the next loss of it must be noticed, or something is no longer measured. Figures depend on
the versions of torch and Python, on which kernels the processor gets and on whether our own C++ kernel is there, so
expectations are kept per such key. Instructions (`bench.instructions`) are compared with those of a base revision,
counted beside: HEAD if dsv3/ or bench/ differ from it, otherwise HEAD~1, or --base REVISION. Fewer are printed and are
no failure. What differs is measured again: figures that do not repeat have no verdict. Each run is noted in gate.jsonl,
with the dispatch that experts take there; which one a case took shows in its operators, and so is held by equality too.

Exit code 0: equal; 1: something costs more; 2: the gate was asked for what it cannot do, or it failed itself, and
nothing costs more as far as it came; 3: no expectations for this key yet (1 with --require); 4: unstable;
5: something costs less and nothing more.
"""

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import instructions
from bench.differences import Figures, differences
from bench.expectations import (
    EXPECTATIONS,
    Found,
    Stored,
    accept,
    accepted_since,
    load_expectations,
    load_found,
    save,
)
from bench.fingerprint import cpu_vendor, revision, utc_now
from bench.instructions import Comparison
from bench.revision import resolve
from bench.stability import Run, note, repeat
from dsv3.config.rules import require

EQUAL, DEARER, BROKEN, UNKNOWN, UNSTABLE, CHEAPER = range(6)
WORST_FIRST = (DEARER, BROKEN, UNSTABLE, CHEAPER, UNKNOWN, EQUAL)
OUTCOMES = ("equal", "dearer", "broken", "unknown", "unstable", "cheaper")


@dataclass(frozen=True)
class Verdict:
    """An exit code, and the figures or pieces of work that it is about."""

    code: int
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class NotCounted:
    """Why there are no instructions, and whether that is as usual here (EQUAL) or a failure (BROKEN)."""

    reason: str
    code: int

    def __str__(self) -> str:
        return f"not counted: {self.reason}"


def main(arguments: list[str] | None = None) -> int:
    """Compare, accept, save or repeat; the exit code."""
    before = spent()
    chosen = parser().parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler logs every start and stop
    try:
        check(chosen)
        stored = load_expectations(EXPECTATIONS)
        given = load_found(chosen.accept_from) if chosen.accept_from else None
        base = resolve(chosen.base) if chosen.base else None
    except (ValueError, OSError) as error:
        print(f"python -m bench.gate: {error}", file=sys.stderr)
        return BROKEN
    if given:
        return accepted(stored, given, chosen.reason)
    code = repeated(chosen.repeat) if chosen.repeat else run(chosen, stored, base)
    cpu, wall = (after - earlier for after, earlier in zip(spent(), before, strict=True))
    print(f"took {cpu:.0f} s of CPU time, {wall:.0f} s in all")
    return code


def check(chosen: argparse.Namespace) -> None:
    """Refuse before anything is measured what would fail after it.

    Raises:
        ValueError: accepting without a reason, or saving into a folder that is not there.
        OSError: the folder of gate.jsonl cannot be made.
    """
    accepting = chosen.accept or chosen.accept_from
    require(not accepting or bool(chosen.reason), "reason", chosen.reason, "accepting needs one", 'give --reason "..."')
    if chosen.save:
        fits = chosen.save.parent.is_dir() and not chosen.save.is_dir()
        require(fits, "save", str(chosen.save), "must be a file in a folder that exists", "make the folder")
    chosen.out.mkdir(parents=True, exist_ok=True)


def repeated(times: int) -> int:
    """Measure in so many fresh processes; the exit code."""
    return guarded(lambda: Verdict(UNSTABLE if any(repeat(times).values()) else EQUAL)).code


def run(chosen: argparse.Namespace, stored: Stored, base: str | None) -> int:
    """Measure, judge, and note what came out; the exit code."""
    here = key()
    verdict = guarded(lambda: measure_and_judge(chosen, stored, base, here))
    if not chosen.accept:
        outcome = OUTCOMES[verdict.code]
        taken = experts()
        print(f"experts: the table's entries for {taken['instructions']}")
        noted = Run(
            time=utc_now(), key=here, revision=revision(), outcome=outcome, figures=verdict.about, experts=taken
        )
        print(f"{note(chosen.out / 'gate.jsonl', noted)} ({chosen.out / 'gate.jsonl'})")
    return verdict.code


def guarded(judge: Callable[[], Verdict]) -> Verdict:
    """Its verdict; where it fails, the failure is shown, which must not pass for something that costs more."""
    try:
        return judge()
    except Exception:
        traceback.print_exc()
        return Verdict(BROKEN)


def measure_and_judge(chosen: argparse.Namespace, stored: Stored, base: str | None, here: str) -> Verdict:
    """Measure the structure while instructions are counted; compare both, or accept them."""
    if chosen.save:
        chosen.save.unlink(missing_ok=True)  # of a run that fails no older file may pass for what it found
    with beside(base) as counted:
        found = Found(key=here, figures=measure())
        if chosen.save:  # what is known by now is kept whatever becomes of the instructions
            save(chosen.save, found)
        structure = Verdict(EQUAL) if chosen.accept else judge_structure(stored, found, chosen.require)
        compared = counted()
    if isinstance(compared, Comparison):
        found = replace(found, dearer=compared.dearer)
        if chosen.save:
            save(chosen.save, found)
    if chosen.accept:
        if isinstance(compared, NotCounted) and compared.code:
            print(f"instructions: {compared}; nothing is accepted")
            return Verdict(compared.code)
        return Verdict(accepted(stored, found, chosen.reason))
    verdicts = (structure, judge_instructions(compared, stored))
    code = next(code for code in WORST_FIRST if any(verdict.code == code for verdict in verdicts))
    return Verdict(code, tuple(name for verdict in verdicts for name in verdict.about))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.gate", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--accept", action="store_true", help="write what is found as the new expectations")
    made.add_argument("--accept-from", type=Path, metavar="FILE", help="write what another machine saved")
    made.add_argument("--reason", default="", help="why they changed; stands in the file")
    made.add_argument("--save", type=Path, metavar="FILE", help="write what is found to a file too")
    made.add_argument("--require", action="store_true", help="fail where this machine has no expectations")
    made.add_argument("--base", metavar="REVISION", help="whose instructions to compare with")
    made.add_argument("--out", type=Path, default=Path("reports", "out"), help="folder of gate.jsonl")
    made.add_argument("--repeat", type=_times, metavar="N", help="measure in N fresh processes; nothing is compared")
    return made


def _times(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 2, to have something to compare")
    return int(text)


@contextmanager
def beside(base: str | None) -> Iterator[Callable[[], Comparison | NotCounted]]:
    """Instructions being counted meanwhile; calling what is given waits for them, or says why there are none."""
    missing = instructions.why_not()
    if base is None and not missing:
        try:
            base = resolve(instructions.default_base())
        except ValueError as error:
            missing = str(error)
    if base is None or missing:
        why = NotCounted(str(missing), EQUAL)
        yield lambda: why
        return
    with ExitStack() as stack:
        counted = attempted(lambda: stack.enter_context(instructions.comparing(base)))
        yield lambda: counted if isinstance(counted, NotCounted) else attempted(counted)


def attempted(count: Callable[[], Any]) -> Any:
    """What `count` returns, or why it failed: valgrind, git and the disk may, and the structure is judged still."""
    try:
        return count()
    except Exception as error:
        return NotCounted(f"{type(error).__name__}: {error}", BROKEN)


def judge_structure(stored: Stored, found: Found, needed: bool) -> Verdict:
    """Print what differs from the expectations of this key, and what that means."""
    if found.key not in stored:
        known = "; ".join(stored) or "none"
        print(
            f'no expectations for {found.key}. Known: {known}. To add it: python -m bench.gate --accept --reason "..."'
        )
        return Verdict(DEARER if needed else UNKNOWN)
    changes = list(differences(stored[found.key]["figures"], found.figures))
    if not changes:
        print(f"{len(found.figures)} cases equal their expectations for {found.key}")
        return Verdict(EQUAL)
    shaky = list(differences(found.figures, measure()))
    if shaky:
        print("\n".join(map(str, shaky)))
        print(f"unstable: {len(shaky)} figures changed when they were measured again, so nothing is said of the rest")
        return Verdict(UNSTABLE, tuple(change.where for change in shaky))
    print("\n".join(map(str, changes)))
    print(f'{len(changes)} figures differ. If that is meant: python -m bench.gate --accept --reason "..."')
    code = DEARER if any(change.dearer for change in changes) else CHEAPER
    return Verdict(code, tuple(change.where for change in changes))


def judge_instructions(compared: Comparison | NotCounted, stored: Stored) -> Verdict:
    """Print the rows that moved out of the margins and what that means."""
    print(f"instructions: {compared}")
    if isinstance(compared, NotCounted):
        return Verdict(compared.code)
    if not compared.dearer:
        return Verdict(EQUAL)
    since = accepted_since(stored, instructions.json_at(compared.base, "bench/expectations.json"))
    for work in sorted(since.keys() & compared.dearer.keys()):
        print(f"instructions: {work}: {since[work][0]} was accepted since then: {since[work][1]}")
    allowed = {work: rise for work, (rise, _) in since.items()}
    dearer = compared.beyond(allowed)
    if not dearer:
        return Verdict(EQUAL)
    again = attempted(lambda: counted_again(compared.base, dearer))
    if isinstance(again, NotCounted):
        print(f"instructions, again: {again}")
        return Verdict(again.code)
    if set(again.beyond(allowed)) != set(dearer):
        quiet = sorted(set(dearer) - set(again.beyond(allowed)))
        print(f"unstable: counted again, {', '.join(quiet)} cost no more than the base")
        return Verdict(UNSTABLE, tuple(dearer))
    print('more instructions. If that is meant: python -m bench.gate --accept --reason "..."')
    return Verdict(DEARER, tuple(f"instructions.{work}" for work in dearer))


def counted_again(base: str, work: list[str]) -> Comparison:
    """The comparison of some pieces of work alone."""
    with instructions.comparing(base, work) as counted:
        return counted()


def measure() -> Figures:
    """Every case's figures."""
    from bench import structure

    return structure.measure()


def key() -> str:
    """What the structure depends on: where it is measured, and whether the C++ kernel can be had; it is built now."""
    from dsv3.attention.kernels import blocks

    return f"{place()}, {'no ' if blocks.why_not() else ''}C++ kernel"


def experts() -> dict[str, str]:
    """Which dispatch the experts take here."""
    from dsv3.moe.dispatch import chosen_here

    return chosen_here()


def place() -> str:
    """What exact figures of any code depend on: versions, and the kernels that this processor gets."""
    import torch

    python = ".".join(platform.python_version_tuple()[:2])
    kernels = f"{cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, python {python}, {kernels}, 1 thread"


def accepted(stored: Stored, found: Found, reason: str) -> int:
    """Accept what was found and say how much of it is new; the exit code."""
    changes = list(differences(stored.get(found.key, {}).get("figures", {}), found.figures))
    accept(EXPECTATIONS, stored, found, reason)
    rises = "".join(f"; more instructions: {work} ({rise})" for work, rise in found.dearer.items())
    print(f"{len(changes)} figures accepted for {found.key}{rises}")
    return EQUAL


def spent() -> tuple[float, float]:
    """CPU seconds of this process and of those that it started and that have ended, and the time."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system, time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
