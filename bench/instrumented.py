"""What runs inside valgrind: each piece of work once to warm up, and once between two marks.

    python -m bench.instrumented ANSWER.json [WORK ...]

Importing and building run before instrumentation begins (`--instr-atstart=no`), which saves most of the time; so does
loading the attention kernel, which is compiled where this revision's is not at hand yet. Then the collector is
switched on for one call at a time, and each mark writes what was collected to callgrind's next file of output; the
answer says which is whose. Garbage collection is off and one thread works. `bench.instructions` starts this, with the
address layout and the hash seed fixed, so that a count repeats to the last digit.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

EVERYTHING = "every work"  # of which a reason may hold


def main(arguments: list[str]) -> None:
    """Count the named pieces of work, or all of them, and write the answer."""
    answer, *names = arguments
    import torch

    torch.set_num_threads(1)
    reasons: dict[str, str] = {}
    built = build(names, reasons)
    load_kernel()
    gc.collect()
    gc.disable()
    instrument()
    counted = [name for name, (call, state) in built.items() if count(name, call, state, reasons)]
    told = {"instruction_set": torch.backends.cpu.get_cpu_capability(), "counted": counted, "reasons": reasons}
    Path(answer).write_text(json.dumps(told))


def build(names: list[str], reasons: dict[str, str]) -> dict[str, Any]:
    """Call and state of each piece of work; why there is none goes into `reasons`."""
    try:
        from bench.variants import works
    except Exception as error:  # an older dsv3 may lack what a case needs, in any way
        reasons[EVERYTHING] = f"{type(error).__name__}: {error}"
        return {}
    built = {}
    for name, make in works().items():
        if names and name not in names:
            continue
        try:
            work = make()
            built[name] = (work.call, work.build())
        except Exception as error:  # as above
            reasons[name] = f"{type(error).__name__}: {error}"
    return built


def load_kernel() -> None:
    """Have the attention kernel at hand, where this dsv3 has one and the machine can build it."""
    try:
        from dsv3.attention.kernels import blocks
    except ImportError:
        return
    blocks.why_not()


def count(name: str, call: Any, state: Any, reasons: dict[str, str]) -> bool:
    """Warm up and collect one call; whether it could be called."""
    import torch

    try:
        call(state)
    except Exception as error:  # as above
        reasons[name] = f"{type(error).__name__}: {error}"
        return False
    torch._C._valgrind_toggle()
    call(state)
    torch._C._valgrind_toggle_and_dump_stats()
    return True


def instrument() -> None:
    """Have valgrind instrument this process from here on."""
    vgdb = shutil.which("vgdb")
    assert vgdb, "vgdb comes with valgrind"
    asked = subprocess.Popen((vgdb, f"--pid={os.getpid()}", "instrumentation", "on"), stdout=subprocess.DEVNULL)
    while asked.poll() is None:  # valgrind looks for orders while the process computes; waking a sleeper needs ptrace
        pass
    assert asked.returncode == 0, "valgrind took the order"


if __name__ == "__main__":
    main(sys.argv[1:])
