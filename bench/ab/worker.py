"""An arm's process, forked by `bench.ab.turns`: builds cases of its own dsv3 and times them when told to.

    ("decode", None)            "" once it is built and warmed up, or why this dsv3 cannot serve it
    ("decode", [5, 5, 10])      seconds of a turn's calls, of 5 pieces of work after them, of 5 more, of 10 more
    None                        leave the cases and end

A piece of work is a product of matrices of the model's size: real work, not waiting.
"""

import gc
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from multiprocessing.connection import Connection

from bench.ab.cases import CASES, Call, Case

WARM_UP = 2  # the first call allocates, the second finds the caches half full
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def serve(tree: str, requests: Connection) -> None:
    """Answer every request, in order, with that folder's dsv3."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, tree)
    calls: dict[str, Call] = {}
    with suppress(EOFError), ExitStack() as opened:
        while (asked := requests.recv()) is not None:
            name, pieces = asked
            case = CASES[name]
            if pieces is not None:
                requests.send(timed(case, calls[name], pieces))
                continue
            try:
                calls[name] = build(case, opened)
                requests.send("")
            except Exception as error:  # an older dsv3 may fail in any way, and the way is the answer
                requests.send(f"{type(error).__name__}: {error}")


def build(case: Case, opened: ExitStack) -> Call:
    """The case's call after its warm-up."""
    call = opened.enter_context(case.make())
    for _ in range(WARM_UP):
        call()
    gc.collect()
    return call


def timed(case: Case, call: Call, pieces: Sequence[int]) -> list[float]:
    """Seconds of a turn's calls, then of each so many pieces of work."""
    read = CLOCKS[case.clock]
    marks = [read()]
    for _ in range(case.calls):
        call()
    marks.append(read())
    for count in pieces:
        work(count)
        marks.append(read())
    return [after - before for before, after in pairwise(marks)]


def work(pieces: int) -> None:
    """So many products of small matrices, as a layer of the cases' models has them."""
    import torch

    left = right = torch.ones(64, 64)
    for _ in range(pieces):
        torch.mm(left, right)
