"""A fresh process that times calls of cases when told to: `python -m bench.ab.worker`.

Requests and answers are JSON lines on standard input and output:

    {"build": "decode"}                 {}, or {"error": why this dsv3 cannot serve the case}; calls it to warm up
    {"case": "decode", "calls": 4}      {"seconds": [...]}, one number per call

A control is told {"build": "decode", "slow": [0.05, 0.1, 0.2]} and answers with a list per call: its seconds, and those
of the call with so much work more. The work is real: products of matrices of the model's size, as many as take that
share of a call, done after the call while the clock runs on.

The process ends with its input. What a library prints goes to standard error, so that it cannot pass for an answer.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, TextIO

from bench.ab.cases import CASES, Call

WARM_UP = 3  # the first call allocates, the second finds the caches half full
TRIALS, PIECES = 7, 100  # calls, each beside so many pieces, that say how many pieces make a slow-down
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Built:
    """A case ready to be called, its clock, and how many pieces of work each slow-down adds to the one before."""

    call: Call
    clock: Callable[[], float]
    pieces: tuple[int, ...] = ()


def main() -> None:
    """Answer on the standard output of this process until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    gc.disable()
    serve(sys.stdin, answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer every request, in order."""
    with ExitStack() as opened:
        cases: dict[str, Built] = {}
        for line in requests:
            asked = json.loads(line)
            answer: dict[str, Any] = {}
            if "build" in asked:
                try:
                    cases[asked["build"]] = build(asked["build"], asked.get("slow", ()), opened)
                except Exception as error:  # an older dsv3 may fail in any way, and the way is the answer
                    answer = {"error": f"{type(error).__name__}: {error}"}
            else:
                answer = {"seconds": timed(cases[asked["case"]], asked["calls"])}
            print(json.dumps(answer), file=answers, flush=True)


def build(name: str, slow: Sequence[float], opened: ExitStack) -> Built:
    """The case after its warm-up, with the pieces of work that make these slow-downs, each greater than the last."""
    case = CASES[name]
    call, clock = opened.enter_context(case.make()), CLOCKS[case.clock]
    for _ in range(WARM_UP):
        call()
    gc.collect()
    if not slow:
        return Built(call, clock)
    worth = []  # of a call, in pieces: two times beside each other, since both change with what else the machine does
    for _ in range(TRIALS):
        before = clock()
        call()
        between = clock()
        work(PIECES)
        worth.append(PIECES * (between - before) / (clock() - between))
    counts = [round(share * median(worth)) for share in slow]
    return Built(call, clock, tuple(after - before for before, after in pairwise((0, *counts))))


def timed(built: Built, calls: int) -> list[Any]:
    """Seconds of so many calls; with slow-downs a list for each, its seconds and those with the added work."""
    read, call = built.clock, built.call
    taken: list[Any] = []
    for _ in range(calls):
        start = read()
        call()
        marks = [read() - start]
        for pieces in built.pieces:
            work(pieces)
            marks.append(read() - start)
        taken.append(marks if built.pieces else marks[0])
    return taken


def work(pieces: int) -> None:
    """So many products of small matrices, as a layer of the cases' models has them."""
    import torch

    left = right = torch.ones(64, 64)
    for _ in range(pieces):
        torch.mm(left, right)


if __name__ == "__main__":
    main()
