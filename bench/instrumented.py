"""What runs inside valgrind: each piece of work once to warm up, and later once between two marks.

    python -m bench.instrumented ANSWER.json [WORK ...]

Importing, building and the warm-up run before instrumentation begins (`--instr-atstart=no`), which saves most of the
time: that also loads the attention kernel, and compiles it where this revision's is not at hand yet. Then the collector
is switched on for one call at a time, and each mark writes what was collected to callgrind's next file of output; the
answer says which is whose. Garbage collection is off and one thread works. `bench.instructions` starts this, with the
address layout and the hash seed fixed, so that a count repeats.
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
    gc.collect()
    gc.disable()
    instrument()
    for call, state in built.values():
        count(call, state)
    told = {"instruction_set": torch.backends.cpu.get_cpu_capability(), "counted": list(built), "reasons": reasons}
    Path(answer).write_text(json.dumps(told))


def build(names: list[str], reasons: dict[str, str]) -> dict[str, Any]:
    """Call and state of each piece of work after one call; why there is none goes into `reasons`."""
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
            state = work.build()
            work.call(state)
            built[name] = (work.call, state)
        except Exception as error:  # as above
            reasons[name] = f"{type(error).__name__}: {error}"
    return built


def count(call: Any, state: Any) -> None:
    """Collect one call and leave the count in callgrind's next file."""
    import torch

    torch._C._valgrind_toggle()
    call(state)
    torch._C._valgrind_toggle_and_dump_stats()


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
