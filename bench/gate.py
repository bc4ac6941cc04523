"""The gate: exact figures of small training steps and pipeline plans against bench/expectations.json, equal both ways.

    python -m bench.gate                               compare
    python -m bench.gate --accept --reason "..."       write what was found as the new expectation, and why

An unexpected saving fails too: either it is real, and the next loss of it must be noticed, or something is no longer
measured. Figures depend on the versions of torch and Python and on which kernels the processor gets, so expectations
are kept per such key. Exit code 0: equal; 1: something differs; 3: no expectations for this key yet.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.fingerprint import cpu_vendor

EXPECTATIONS = Path(__file__).parent / "expectations.json"
EQUAL, DIFFERENT, UNKNOWN = 0, 1, 3

Figures = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Compare, or accept."""
    chosen = parser().parse_args(arguments)
    if chosen.accept and not chosen.reason:
        print('python -m bench.gate: --accept needs --reason "why the figures changed"', file=sys.stderr)
        return 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler logs every start and stop
    found, here = measure(), key()
    stored = json.loads(EXPECTATIONS.read_text()) if EXPECTATIONS.exists() else {}
    expected = stored.get(here, {}).get("figures")
    changes = list(differences(expected or {}, found))
    if chosen.accept:
        accept(stored | {here: {"reason": chosen.reason, "figures": found}})
        print(f"{len(changes)} figures accepted for {here}")
        return EQUAL
    if expected is None:
        known = "; ".join(stored) or "none"
        print(f'no expectations for {here}. Known: {known}. To add it: python -m bench.gate --accept --reason "..."')
        return UNKNOWN
    print("\n".join(changes) if changes else f"{len(found)} cases equal their expectations for {here}")
    if changes:
        print(f'{len(changes)} figures differ. If that is meant: python -m bench.gate --accept --reason "..."')
    return DIFFERENT if changes else EQUAL


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.gate", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--accept", action="store_true", help="write what is found as the new expectations")
    made.add_argument("--reason", default="", help="why they changed; stands in the file")
    return made


def measure() -> dict[str, Any]:
    """Every variant's figures, and every plan's."""
    from bench.variants import measure_plans, measure_step, variants

    return {name: measure_step(config) for name, config in variants().items()} | measure_plans()


def key() -> str:
    """What exact figures depend on: versions, and the kernels that this processor gets."""
    import torch

    python = ".".join(platform.python_version_tuple()[:2])
    kernels = f"{cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, python {python}, {kernels}, 1 thread"


def differences(expected: Figures, found: Figures, path: str = "") -> Iterator[str]:
    """A line for each figure that is not equal, gone, or new."""
    for name in sorted(expected.keys() | found.keys()):
        where = f"{path}.{name}" if path else name
        old, new = expected.get(name), found.get(name)
        if isinstance(old, dict) or isinstance(new, dict):
            yield from differences(old or {}, new or {}, where)
        elif old != new:
            change = "" if old is None or new is None else f" ({new - old:+})"
            yield f"{where}: expected {old}, found {new}{change}"


def accept(expectations: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    temporary = EXPECTATIONS.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(expectations, indent=1, sort_keys=True) + "\n")
    temporary.replace(EXPECTATIONS)


if __name__ == "__main__":
    sys.exit(main())
