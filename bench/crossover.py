"""Find from which length on attention down a tree is faster than dense attention here: `python -m bench.crossover`.

    ratio(n)     CPU time of the tree with our C++ kernel / of torch's dense attention, the faster of its formats, block
                 by block, one thread, the order of the arms alternated; choosing is in the time
    crossover    the shortest measured length from which on the whole 95% interval of the median ratio lies below 1

One layer without its projections, 16 blocks of 64 keys seen (`bench.block_attention`). What is found replaces the rows
of this processor's instruction set in the table that `dsv3.attention.select.auto` reads; the others stay.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from bench import block_attention
from bench.fingerprint import fingerprint
from bench.measured_table import write
from bench.meters.paired import over_blocks, plan, process_clock, threads, time_block
from dsv3.attention.kernels.blocks import instruction_sets
from dsv3.attention.select.auto import TABLE, rows

LENGTHS = tuple(2**power for power in range(7, 14))
BLOCKS = 11  # the interval of their median leaves out the two outermost
DIRECTIONS: Mapping[str, Callable[[str, block_attention.Inputs], object]] = {
    "forward": block_attention.inference,
    "training": block_attention.training,
}
HEAD = """\
# From which length on attention down a tree is faster than torch's dense attention, by instruction set of the C++
# kernel, number format and direction. `python -m bench.crossover` says how it is measured and writes the rows of the
# machine that it runs on. ratio: time of the tree over that of dense attention there, the median and its 95% interval.
"""


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """A row of the table."""

    instructions: str
    dtype: str
    direction: str
    length: int
    ratio: tuple[float, float, float]
    processor: str
    torch: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; 1 where this machine has no kernel to measure."""
    opening = (__doc__ or "").splitlines()[0]
    argparse.ArgumentParser(prog="python -m bench.crossover", description=opening).parse_args(arguments)
    given = block_attention.inputs(LENGTHS[0], torch.float32)
    if reason := block_attention.why_not("hierarchical", given):
        print(f"python -m bench.crossover: nothing to measure: {reason}", file=sys.stderr)
        return 1
    with threads(1):
        found = list(measured())
    kept = [row for row in rows() if row["instructions"] != instruction_sets()[0]]
    write(TABLE, HEAD, [*kept, *map(asdict, found)])
    print(f"{len(found)} rows in {TABLE}")
    return 0


def measured() -> Iterator[Crossover]:
    """A row per format and direction in which there is a crossover among the lengths."""
    machine = fingerprint()
    for dtype in (torch.float32, torch.bfloat16):
        for direction in DIRECTIONS:
            length, ratio = crossing(partial(measure, dtype, direction))
            if length is not None:
                yield Crossover(
                    instructions=instruction_sets()[0],
                    dtype=str(dtype).removeprefix("torch."),
                    direction=direction,
                    length=length,
                    ratio=ratio,
                    processor=str(machine["processor"]),
                    torch=torch.__version__,
                )


Ratio = tuple[float, float, float]


def crossing(ratio: Callable[[int], Ratio]) -> tuple[int | None, Ratio]:
    """The shortest of the lengths from which on `ratio`, a median and its interval, lies below 1, and the ratio there.

    None where it does not at the longest. No shorter length is measured than the first that fails.
    """
    found: int | None = None
    there = (1.0, 1.0, 1.0)
    for length in reversed(LENGTHS):
        here = ratio(length)
        if here[2] >= 1:
            break
        found, there = length, here
    return found, there


def measure(dtype: torch.dtype, direction: str, length: int) -> Ratio:
    """The median over blocks of the tree's time over the faster dense form's, and its interval."""
    given, call = block_attention.inputs(length, dtype), DIRECTIONS[direction]
    dense = ("sdpa",) if dtype == torch.float32 else ("sdpa", "sdpa_fp32")
    block_attention.check("hierarchical", given)
    arms = {arm: partial(call, arm, given) for arm in (*dense, "hierarchical")}
    calls = plan(arms, least=BLOCKS, seconds=0.0).calls
    taken = [time_block(arms, block, calls, process_clock) for block in range(BLOCKS)]
    ratios = tuple(block["hierarchical"].cpu / min(block[arm].cpu for arm in dense) for block in taken)
    median = over_blocks("forward_cpu_ratio", ratios)
    assert median.interval is not None, "a median of eleven has an interval"
    found = tuple(round(number, 3) for number in (float(median.value), *median.interval))
    print(f"{dtype!s:15} {direction:9} {length:6} tokens: {found[0]} [{found[1]}, {found[2]}]", flush=True)
    return found[0], found[1], found[2]


if __name__ == "__main__":
    sys.exit(main())
