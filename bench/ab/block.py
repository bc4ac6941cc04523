"""A block: one fresh process per arm, side by side, taking turns of a few calls; all that is compared comes from here.

    base       the revision
    head       the working tree
    control    the revision again: the null, whose every alarm is false

Processes are the replicates, because one process keeps its luck (addresses, hash seeds, what lies beside what in the
caches) for all its calls. They take turns within a tenth of a second, because the machine's speed drifts from second to
second: only one computes at a time, the order moves on and reverses from turn to turn (`bench.meters.paired.order`).
The control makes extra calls at the end of its turns, from which slow-downs of known size are put together.

The length of the environment moves the stack, and with it the speed (Mytkowicz et al. 2009, "Producing wrong data
without doing anything obviously wrong!"); it is drawn anew for every process, so that no arm has the better one.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryFile
from typing import IO, Any

from bench.fingerprint import utc_now
from bench.meters.paired import order
from bench.revision import environment

ARMS = ("base", "head", "control")
ROUNDS, CALLS = 12, 2
SLOW = (0.05, 0.1, 0.2)
SLOWED = tuple(f"+{share:.0%}" for share in SLOW)
PADDING = 4096  # bytes: a page, over which the position of the stack repeats

Seconds = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a block measured.

    seconds       by case and arm: seconds of the calls, in order; the control's extra ones under "extra"
    unable        by case: which arm could not serve it, and why
    took          wall seconds of the whole block
    load          load average over a minute, at the end
    """

    seconds: Seconds
    unable: Mapping[str, str]
    took: float
    load: float
    time: str = field(default_factory=utc_now)


class Worker:
    """The parent's end of `bench.ab.worker`."""

    def __init__(self, arm: str, process: "subprocess.Popen[str]", errors: IO[bytes]) -> None:
        self.arm, self._process, self._errors = arm, process, errors

    def send(self, **request: Any) -> None:
        """Hand over a request, whose answer is then to be received."""
        assert self._process.stdin is not None, "opened with pipes"
        with suppress(BrokenPipeError):  # it has ended; `receive` says why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        """Its answer to the request sent.

        Raises:
            RuntimeError: the process has ended, with the end of what it said.
        """
        assert self._process.stdout is not None, "opened with pipes"
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-2000:]
            raise RuntimeError(f"the process of {self.arm} ended with code {self._process.returncode}: {said}")
        result: dict[str, Any] = json.loads(answer)
        return result


@contextmanager
def worker(arm: str, tree: Path, random: Random) -> Iterator[Worker]:
    """A fresh process that imports that folder's dsv3 and bench; ended afterwards."""
    padded = environment(tree) | {"DSV3_AB_PADDING": "x" * random.randrange(PADDING)}
    command = (sys.executable, "-m", "bench.ab.worker")
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            command, env=padded, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield Worker(arm, process, errors)
        finally:
            process.kill()


def run(trees: Mapping[str, Path], cases: Sequence[str], number: int, random: Random) -> Block:
    """Measure the cases on a fresh process per arm; `number` counts the blocks and turns their order."""
    start = time.monotonic()
    with ExitStack() as stack:
        workers = {arm: stack.enter_context(worker(arm, trees[arm], random)) for arm in order(ARMS, number)}
        unable = {case: failed for case in cases if (failed := built(workers, case))}
        able = [case for case in cases if case not in unable]
        seconds = take_turns(workers, able, number)
    took = time.monotonic() - start
    return Block(seconds=seconds, unable=unable, took=took, load=os.getloadavg()[0])


def built(workers: Mapping[str, Worker], case: str) -> str:
    """Have every arm build the case; why the first of them that cannot does not, or nothing."""
    for arm, worker in workers.items():
        worker.send(build=case, slow=SLOW if arm == "control" else ())
    answers = {arm: worker.receive() for arm, worker in workers.items()}
    return next((f"{arm}: {answer['error']}" for arm, answer in answers.items() if answer), "")


def take_turns(workers: Mapping[str, Worker], cases: Sequence[str], number: int) -> Seconds:
    """Seconds of each arm's calls of each case; cases come round again and again, so a bad second hits few calls."""
    taken: Seconds = {case: {arm: [] for arm in (*ARMS, *SLOWED)} for case in cases}
    for turn in range(ROUNDS):
        for case in cases:
            for arm in order(ARMS, number + turn):
                workers[arm].send(case=case, calls=CALLS)
                seconds = workers[arm].receive()["seconds"]
                if arm == "control":
                    for name, column in zip((arm, *SLOWED), zip(*seconds, strict=True), strict=True):
                        taken[case][name] += column
                else:
                    taken[case][arm] += seconds
    return taken
