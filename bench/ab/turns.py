"""The fresh process of a block: one fork of it per arm, taking turns of a few calls (`python -m bench.ab.turns`).

    base       the revision
    head       the working tree
    control    the revision again: the null, whose every alarm is false

It reads a request from standard input, writes what it found to standard output, and ends:

    {"trees": {arm: folder}, "cases": [...], "orders": [the arms as they take turns, ...]}
    {"seconds": {case: {arm: [...]}}, "unable": {case: why not base}, "broken": {case: why not head, though base can}}

A process keeps its luck (addresses, hash seeds, what lies beside what in the caches) for all its calls, so every block
has a new one. Its arms are forks, which import their own dsv3: what luck torch has, they share, and torch is imported
once. They take turns within a tenth of a second, because the machine's speed drifts from second to second; only one
computes at a time, and the order moves on and reverses from turn to turn.

In a turn every arm does the same: its calls, then pieces of extra work, each timed. From the control's calls and pieces
slow-downs of known size are put together: as many pieces as take that share of the base's time for the calls, in the
turns before. The first turn only shows how long both take.
"""

import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from bench.ab.worker import serve

ARMS = ("base", "head", "control")
TURNS = 12  # kept ones: the orders of three arms come round every 6
SLOW = (0.05, 0.1, 0.2)
SLOWED = tuple(f"+{share:.0%}" for share in SLOW)
FIRST = 10  # pieces for each slow-down, before it is known how long they take

Seconds = dict[str, dict[str, list[float]]]


class Ended(RuntimeError):
    """An arm's process has ended before it was told to, at that case."""

    def __init__(self, arm: str, case: str, code: int | None) -> None:
        super().__init__(f"the process of {arm} ended with code {code} at {case}")
        self.arm, self.case = arm, case


class Worker:
    """This end of an arm's process, `bench.ab.worker`."""

    def __init__(self, arm: str, requests: Connection, process: multiprocessing.process.BaseProcess) -> None:
        self.arm, self._requests, self._process, self._case = arm, requests, process, ""

    def send(self, case: str, pieces: Sequence[int] | None = None) -> None:
        """Have it build a case, or take a turn of it with so much extra work; then an answer is to be received."""
        self._case = case
        with suppress(BrokenPipeError):  # it has ended; `receive` says so
            self._requests.send((case, pieces))

    def receive(self) -> Any:
        """The answer to the request sent.

        Raises:
            Ended: there will be none.
        """
        try:
            return self._requests.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise Ended(self.arm, self._case, self._process.exitcode) from None

    def end(self) -> None:
        """Have it leave its cases, within a while."""
        with suppress(BrokenPipeError):
            self._requests.send(None)
        self._process.join(5)
        self._process.kill()
        self._process.join()


@contextmanager
def forked(arm: str, tree: str) -> Iterator[Worker]:
    """A fork of this process that imports that folder's dsv3; ended afterwards."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(tree, theirs))
    process.start()
    theirs.close()
    worker = Worker(arm, ours, process)
    try:
        yield worker
    finally:
        worker.end()


def main() -> None:
    """Answer the request on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to standard error, so that it cannot pass for an answer
    import torch._dynamo  # noqa: F401  by far the most of what dsv3 imports, before the arms part

    gc.disable()
    gc.freeze()  # or collecting the garbage of a case would take the tenth of a second in which all of torch is seen
    json.dump(measured(**json.load(sys.stdin)), answers)


def measured(trees: Mapping[str, str], cases: Sequence[str], orders: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What forks with these trees make of the cases, taking turns in these orders."""
    try:
        with ExitStack() as stack:
            workers = {arm: stack.enter_context(forked(arm, trees[arm])) for arm in orders[0]}
            unable, broken = build(workers, cases)
            able = [] if broken else [case for case in cases if case not in unable]
            return {"seconds": take_turns(workers, able, orders), "unable": unable, "broken": broken}
    except Ended as ended:
        if ended.arm != "head":
            raise
        return {"seconds": {}, "unable": {}, "broken": {ended.case: str(ended)}}


def build(workers: Mapping[str, Worker], cases: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Have every arm build every case: which ones the base cannot serve and why, and which the head though it can."""
    unable, broken = {}, {}
    for case in cases:
        for worker in workers.values():
            worker.send(case)
        base, head, control = (workers[arm].receive() for arm in ARMS)
        if base or control:
            unable[case] = f"base: {base or control}"
        elif head:
            broken[case] = f"head: {head}"
    return unable, broken


def take_turns(workers: Mapping[str, Worker], cases: Sequence[str], orders: Sequence[Sequence[str]]) -> Seconds:
    """Seconds of each arm's turns of each case; cases come round again and again, so a bad second hits few of them."""
    taken: Seconds = {case: {arm: [] for arm in (*ARMS, *SLOWED)} for case in cases}
    done: dict[str, list[tuple[int, float, float]]] = {case: [] for case in cases}
    for turn, order in enumerate(orders):
        for case in cases:
            counts = pieces(done[case])
            plain, extra = {}, {}
            for arm in order:
                workers[arm].send(case, counts)
                plain[arm], *extra[arm] = workers[arm].receive()
            done[case].append((sum(counts), sum(extra["control"]), plain["base"]))
            slowed = [plain["control"] + more for more in accumulate(extra["control"])]
            for arm, seconds in (plain | dict(zip(SLOWED, slowed, strict=True))).items():
                taken[case][arm] += [seconds] if turn else []
    return taken


def pieces(done: Sequence[tuple[int, float, float]]) -> list[int]:
    """How many pieces of work each slow-down adds to the one before, from the pieces, their seconds and the base's."""
    if not done:
        return [FIRST for _ in SLOW]
    count, seconds, calls = zip(*done, strict=True)
    worth = median(calls) * sum(count) / sum(seconds)  # of a turn's calls, in pieces
    return [after - before for before, after in pairwise([0, *(round(share * worth) for share in SLOW)])]


if __name__ == "__main__":
    main()
