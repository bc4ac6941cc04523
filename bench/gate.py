"""The gate: exact figures of small pieces of work (`bench.structure`) against bench/expectations.json, equal both ways.

    python -m bench.gate                               compare
    python -m bench.gate --accept --reason "..."       write what was found as the new expectation, and why
    python -m bench.gate --save FOUND.json             keep what was found, as CI does for a key that you do not have
    python -m bench.gate --accept-from FOUND.json --reason "..."

An unexpected saving fails too: either it is real, and the next loss of it must be noticed, or something is no longer
measured. Figures depend on the versions of torch and Python and on which kernels the processor gets, so expectations
are kept per such key. What differs is measured again: figures that do not repeat have no verdict.

Exit code 0: equal; 1: something costs more; 3: no expectations for this key yet (1 with --require); 4: unstable;
5: something costs less and nothing more.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fingerprint import cpu_vendor

EXPECTATIONS = Path(__file__).parent / "expectations.json"
EQUAL, DEARER, UNKNOWN, UNSTABLE, CHEAPER = 0, 1, 3, 4, 5

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A figure that is not what was expected; None where one of the two has no such figure."""

    where: str
    expected: float | None
    found: float | None

    @property
    def dearer(self) -> bool:
        """Whether it costs more than expected; a figure that only one side has counts as zero on the other."""
        return (self.found or 0) > (self.expected or 0)

    def __str__(self) -> str:
        both = self.expected is not None and self.found is not None
        change = f" ({(self.found or 0) - (self.expected or 0):+})" if both else ""
        return f"{self.where}: expected {self.expected}, found {self.found}{change}"


def main(arguments: list[str] | None = None) -> int:
    """Compare, accept or save."""
    chosen = parser().parse_args(arguments)
    if (chosen.accept or chosen.accept_from) and not chosen.reason:
        print('python -m bench.gate: accepting needs --reason "why the figures changed"', file=sys.stderr)
        return 2
    stored = json.loads(EXPECTATIONS.read_text()) if EXPECTATIONS.exists() else {}
    if chosen.accept_from:
        given = json.loads(chosen.accept_from.read_text())
        return accept(stored, given["key"], given["figures"], chosen.reason)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler logs every start and stop
    found, here = measure(), key()
    if chosen.save:
        write(chosen.save, {"key": here, "figures": found})
    if chosen.accept:
        return accept(stored, here, found, chosen.reason)
    if here not in stored:
        known = "; ".join(stored) or "none"
        print(f'no expectations for {here}. Known: {known}. To add it: python -m bench.gate --accept --reason "..."')
        return DEARER if chosen.require else UNKNOWN
    return judge(stored[here]["figures"], found, here)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.gate", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--accept", action="store_true", help="write what is found as the new expectations")
    made.add_argument("--accept-from", type=Path, metavar="FILE", help="write what another machine saved")
    made.add_argument("--reason", default="", help="why they changed; stands in the file")
    made.add_argument("--save", type=Path, metavar="FILE", help="write what is found to a file too")
    made.add_argument("--require", action="store_true", help="fail where this machine has no expectations")
    return made


def judge(expected: Figures, found: Figures, here: str) -> int:
    """Print what differs and what that means; the exit code."""
    changes = list(differences(expected, found))
    if not changes:
        print(f"{len(found)} cases equal their expectations for {here}")
        return EQUAL
    shaky = list(differences(found, measure()))
    if shaky:
        print("\n".join(map(str, shaky)))
        print(f"unstable: {len(shaky)} figures changed when they were measured again, so nothing is said of the rest")
        return UNSTABLE
    print("\n".join(map(str, changes)))
    print(f'{len(changes)} figures differ. If that is meant: python -m bench.gate --accept --reason "..."')
    return DEARER if any(change.dearer for change in changes) else CHEAPER


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


def differences(expected: Figures, found: Figures, path: str = "") -> Iterator[Difference]:
    """Each figure that is not equal, gone, or new."""
    for name in sorted(expected.keys() | found.keys()):
        where = f"{path}.{name}" if path else name
        old, new = expected.get(name), found.get(name)
        if isinstance(old, dict) or isinstance(new, dict):
            yield from differences(old or {}, new or {}, where)
        elif old != new:
            yield Difference(where, old, new)


def accept(stored: Mapping[str, Any], here: str, found: Figures, reason: str) -> int:
    """Make what was found the expectation of its key; the exit code."""
    changes = list(differences(stored.get(here, {}).get("figures", {}), found))
    write(EXPECTATIONS, {**stored, here: {"reason": reason, "figures": found}})
    print(f"{len(changes)} figures accepted for {here}")
    return EQUAL


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
