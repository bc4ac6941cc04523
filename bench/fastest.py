"""Find which dispatch of the experts is fastest here, by the rows of an expert: `python -m bench.fastest`.

    ratio       CPU time of a dispatch / of `looped`, the median over blocks in which the arms take turns, one thread;
                the geometric mean of two widths
    fastest     the dispatch of the smallest ratio, `looped` where no other is a twentieth faster: it keeps least

16 experts of which a token takes 2, routing at random. `padded` is no candidate: it pays for the fullest expert's rows
as often as there are experts, and routing may be uneven. Each set of instructions that this processor has for the C++
kernel is measured in a process in which torch is held to the same ones, as far as it lets itself be (its MKL on
processors of AMD does not), and last, as the set "none", the other dispatches alone. `--sets` measures some of them.
Entries of other sets stay in the table.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import geometric_mean
from typing import Any

import torch

from bench.expert_layers import Shape, build
from bench.fingerprint import fingerprint
from bench.measured_table import write
from bench.meters.paired import plan, process_clock, ratio, threads, time_block
from dsv3.moe.fastest import TABLE, WITHOUT, table
from dsv3.moe.kernels.experts import instruction_sets, why_not

BASELINE = "looped"
NARROWER: Mapping[str, Mapping[str, str]] = {  # what holds torch to a set of instructions
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
EXPERTS, K = 16, 2
WIDTHS = {256: 128, 1024: 256}  # of the model, and of an expert
ROWS = (8, 32, 256)
BLOCKS = 7
GAIN = 0.95
HEAD = """\
# Which dispatch of the experts is the fastest on a CPU, by instruction set of the C++ kernel ("none": without it),
# number format, direction and rows of an average expert. `python -m bench.fastest` says how it is measured and writes
# the entries of the sets that its machine has. Behind a dispatch: its CPU time over that of `looped`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.fastest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="SET", help="print the entries of one set of instructions, and write nothing")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="measure these alone; default: all of this machine")
    given = parser.parse_args(arguments)
    only = given.only
    if only is not None:
        with threads(1):
            for row in measured(only):
                print(json.dumps(row), flush=True)
        return 0
    here = (*(instruction_sets() if why_not() is None else ()), WITHOUT)
    sets = tuple(dict.fromkeys(given.sets or here))
    if strange := [name for name in sets if name not in here]:
        parser.error(f"--sets={' '.join(strange)}: must be of {', '.join(here)}, which this machine has")
    found = [row for name in sets for row in _in_a_process(name)]
    write(TABLE, HEAD, [*(row for row in table() if row["instructions"] not in sets), *found])
    print(f"{len(found)} entries in {TABLE}")
    return 0


def _in_a_process(instructions: str) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.fastest", "--only", instructions]
    limits = os.environ | NARROWER.get(instructions, {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=limits) as process:
        assert process.stdout is not None, "it was asked for"
        for line in process.stdout:
            print(line, end="", flush=True)
            yield json.loads(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def measured(instructions: str) -> Iterator[dict[str, Any]]:
    """The entries of one set; without the kernel also of float16, which it does not compute."""
    machine = fingerprint()
    for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if instructions == WITHOUT else ())):
        for direction in ("forward", "training"):
            for rows in ROWS:
                each = [ratios(instructions, dtype, direction, rows, width) for width in WIDTHS]
                means = {name: geometric_mean([found[name] for found in each]) for name in each[0]}
                yield {
                    "instructions": instructions,
                    "dtype": str(dtype).removeprefix("torch."),
                    "direction": direction,
                    "rows": rows,
                    "fastest": winner(means),
                    **{name: round(mean, 3) for name, mean in means.items()},
                    "processor": str(machine["processor"]),
                    "torch": torch.__version__,
                }


def winner(ratios: Mapping[str, float]) -> str:
    """The dispatch to take, by the times over those of `looped`."""
    best = min(ratios, key=lambda name: ratios[name], default=BASELINE)
    return best if ratios and ratios[best] < GAIN else BASELINE


def ratios(instructions: str, dtype: torch.dtype, direction: str, rows: int, width: int) -> dict[str, float]:
    """The time of each other dispatch over that of `looped`, at one width."""
    shape = Shape(rows * EXPERTS // K, width, WIDTHS[width], EXPERTS, K)
    names = ("grouped", BASELINE) if instructions == WITHOUT else ("kernel", "grouped", BASELINE)
    named = "" if instructions == WITHOUT else instructions
    made = build(shape, dtype, torch.device("cpu"), names=names, instructions=named)
    arms = {name: arm.step if direction == "training" else torch.no_grad()(arm.output) for name, arm in made.items()}
    calls = plan(arms, least=BLOCKS, seconds=0.0).calls
    taken = [time_block(arms, block, calls, process_clock) for block in range(BLOCKS)]
    phase = "forward_backward" if direction == "training" else "forward"
    return {name: float(ratio(taken, name, BASELINE, phase, "cpu").value) for name in names if name != BASELINE}


if __name__ == "__main__":
    sys.exit(main())
