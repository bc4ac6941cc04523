"""The gate: what small pieces of work cost, exactly. Exit code 1 if something costs more.

    python -m bench.gate                               compare
    python -m bench.gate --accept --reason "..."       write what was found as the new expectation, and why
    python -m bench.gate --save FOUND.json             keep what was found, as CI does for a key that you do not have
    python -m bench.gate --accept-from FOUND.json --reason "..."
    python -m bench.gate --repeat 20                   are all figures identical in 20 fresh processes?

Structure (`bench.structure`) is compared with bench/expectations.json, equal both ways: an unexpected saving fails too,
since either it is real, and the next loss of it must be noticed, or something is no longer measured. Figures depend on
the versions of torch and Python and on which kernels the processor gets, so expectations are kept per such key.
Instructions (`bench.instructions`) are compared with those of a base revision, counted beside: HEAD if dsv3/ or bench/
differ from it, otherwise HEAD~1, or --base REVISION. Fewer are printed and are no failure. What differs is measured
again: figures that do not repeat have no verdict. Each run is noted in gate.jsonl.

Exit code 0: equal; 1: something costs more; 3: no expectations for this key yet (1 with --require); 4: unstable;
5: something costs less and nothing more.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import instructions
from bench.differences import Figures, differences
from bench.fingerprint import cpu_vendor, revision
from bench.instructions import Comparison
from bench.revision import resolve
from bench.stability import Run, note, repeat

EXPECTATIONS = Path(__file__).parent / "expectations.json"
EQUAL, DEARER, UNKNOWN, UNSTABLE, CHEAPER = 0, 1, 3, 4, 5
WORST_FIRST = (DEARER, UNSTABLE, CHEAPER, UNKNOWN, EQUAL)
OUTCOMES = {DEARER: "dearer", UNSTABLE: "unstable", CHEAPER: "cheaper", UNKNOWN: "unknown", EQUAL: "equal"}


@dataclass(frozen=True)
class Verdict:
    """An exit code, and the figures or pieces of work that it is about."""

    code: int
    about: tuple[str, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    """Compare, accept, save or repeat."""
    chosen = parser().parse_args(arguments)
    if (chosen.accept or chosen.accept_from) and not chosen.reason:
        print('python -m bench.gate: accepting needs --reason "why the figures changed"', file=sys.stderr)
        return 2
    stored = json.loads(EXPECTATIONS.read_text()) if EXPECTATIONS.exists() else {}
    if chosen.accept_from:
        given = json.loads(chosen.accept_from.read_text())
        return accept(stored, given["key"], given["figures"], given.get("dearer", []), chosen.reason)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler logs every start and stop
    if chosen.repeat:
        return UNSTABLE if any(repeat(chosen.repeat).values()) else EQUAL
    try:
        base = resolve(chosen.base) if chosen.base else None
    except ValueError as error:
        print(f"python -m bench.gate: {error}", file=sys.stderr)
        return 2
    return run(chosen, stored, base)


def run(chosen: argparse.Namespace, stored: Mapping[str, Any], base: str | None) -> int:
    """Measure the structure while instructions are counted; compare both, or accept them."""
    with beside(base) as counted:
        found, here = measure(), key()
        structure = Verdict(EQUAL) if chosen.accept else judge_structure(stored, found, here, chosen.require)
        compared = counted()
    dearer = compared.dearer if isinstance(compared, Comparison) else []
    if chosen.save:
        write(chosen.save, {"key": here, "figures": found, "dearer": dearer, "instructions": str(compared)})
    if chosen.accept:
        return accept(stored, here, found, dearer, chosen.reason)
    verdicts = (structure, judge_instructions(compared, stored))
    code = next(code for code in WORST_FIRST if any(verdict.code == code for verdict in verdicts))
    about = tuple(name for verdict in verdicts for name in verdict.about)
    noted = Run(time=now(), key=here, revision=revision(), outcome=OUTCOMES[code], figures=about)
    print(f"{note(chosen.out / 'gate.jsonl', noted)} ({chosen.out / 'gate.jsonl'})")
    return code


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
def beside(base: str | None) -> Iterator[Callable[[], Comparison | str]]:
    """Instructions being counted meanwhile; calling what is given waits for them, or says why there are none."""
    missing = instructions.why_not()
    if base is None and not missing:
        try:
            base = resolve(instructions.default_base())
        except ValueError as error:
            missing = str(error)
    if base is None or missing:
        yield lambda: f"not counted: {missing}"
        return
    with instructions.comparing(base) as counted:
        yield counted


def judge_structure(stored: Mapping[str, Any], found: Figures, here: str, require: bool) -> Verdict:
    """Print what differs from the expectations of this key, and what that means."""
    if here not in stored:
        known = "; ".join(stored) or "none"
        print(f'no expectations for {here}. Known: {known}. To add it: python -m bench.gate --accept --reason "..."')
        return Verdict(DEARER if require else UNKNOWN)
    changes = list(differences(stored[here]["figures"], found))
    if not changes:
        print(f"{len(found)} cases equal their expectations for {here}")
        return Verdict(EQUAL)
    shaky = list(differences(found, measure()))
    if shaky:
        print("\n".join(map(str, shaky)))
        print(f"unstable: {len(shaky)} figures changed when they were measured again, so nothing is said of the rest")
        return Verdict(UNSTABLE, tuple(change.where for change in shaky))
    print("\n".join(map(str, changes)))
    print(f'{len(changes)} figures differ. If that is meant: python -m bench.gate --accept --reason "..."')
    code = DEARER if any(change.dearer for change in changes) else CHEAPER
    return Verdict(code, tuple(change.where for change in changes))


def judge_instructions(compared: Comparison | str, stored: Mapping[str, Any]) -> Verdict:
    """Print the rows that moved out of the margins and what that means."""
    print(f"instructions: {compared}")
    if isinstance(compared, str) or not compared.dearer:
        return Verdict(EQUAL)
    reasons = accepted_since(stored, instructions.json_at(compared.base, "bench/expectations.json"))
    dearer = [work for work in compared.dearer if work not in reasons]
    for work in sorted(reasons.keys() & set(compared.dearer)):
        print(f"instructions: {work} was accepted since then: {reasons[work]}")
    if not dearer:
        return Verdict(EQUAL)
    with instructions.comparing(compared.base, dearer) as counted:
        again = counted().dearer
    if set(again) != set(dearer):
        print(f"unstable: counted again, {', '.join(sorted(set(dearer) - set(again)))} cost no more than the base")
        return Verdict(UNSTABLE, tuple(dearer))
    print('more instructions. If that is meant: python -m bench.gate --accept --reason "..."')
    return Verdict(DEARER, tuple(f"instructions.{work}" for work in dearer))


def accepted_since(stored: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str]:
    """Work whose instructions were accepted by an entry that the base's expectations do not have, and why."""
    fresh = [entry for here, entry in stored.items() if base.get(here) != entry]
    return {work: entry["reason"] for entry in fresh for work in entry.get("dearer", [])}


def measure() -> dict[str, Any]:
    """Every case's figures."""
    from bench import structure

    return structure.measure()


def key() -> str:
    """What exact figures depend on: versions, and the kernels that this processor gets."""
    import torch

    python = ".".join(platform.python_version_tuple()[:2])
    kernels = f"{cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, python {python}, {kernels}, 1 thread"


def accept(stored: Mapping[str, Any], here: str, found: Figures, dearer: Sequence[str], reason: str) -> int:
    """Make what was found the expectation of its key; the exit code."""
    changes = list(differences(stored.get(here, {}).get("figures", {}), found))
    write(EXPECTATIONS, {**stored, here: {"reason": reason, "figures": found, "dearer": list(dearer)}})
    print(f"{len(changes)} figures accepted for {here}" + "".join(f"; more instructions: {work}" for work in dearer))
    return EQUAL


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
