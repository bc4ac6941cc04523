"""A block: all that is compared comes out of the turns of one fresh process, started here (`bench.ab.turns`).

The length of the environment moves the stack, and with it the speed (Mytkowicz et al. 2009, "Producing wrong data
without doing anything obviously wrong!"); it is drawn anew for every block.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from bench.ab.turns import ARMS, TURNS, Seconds
from bench.fingerprint import utc_now
from bench.meters.paired import order
from bench.revision import environment

PADDING = 4096  # bytes: a page, over which the position of the stack repeats


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a block measured.

    seconds       by case and arm, the slow-downs too: seconds of the calls of each turn, in order
    unable        by case: why the base cannot serve it
    took          wall seconds of the whole block
    load          load average over a minute, at the end
    """

    seconds: Seconds
    unable: Mapping[str, str]
    took: float
    load: float
    time: str = field(default_factory=utc_now)


class BrokenHead(Exception):
    """The working tree fails at cases that the base can serve."""


def run(trees: Mapping[str, Path], cases: Sequence[str], number: int, random: Random) -> Block:
    """Measure the cases on a fresh process and its forks; `number` counts the blocks and turns their order.

    Raises:
        BrokenHead: the head fails where the base does not, at which cases and how.
        RuntimeError: the process or the base's fork has ended, with the end of what it said.
    """
    start = time.monotonic()
    folders = {arm: str(tree) for arm, tree in trees.items()}
    padded = environment(trees["base"]) | {"DSV3_AB_PADDING": "x" * random.randrange(PADDING)}
    done = subprocess.run(
        (sys.executable, "-m", "bench.ab.turns"),
        env=padded,
        input=json.dumps({"trees": folders, "cases": cases, "orders": orders(number)}),
        capture_output=True,
        text=True,
    )
    said = done.stderr.strip()[-2000:]
    if done.returncode:
        raise RuntimeError(f"the process of a block ended with code {done.returncode}: {said}")
    found = json.loads(done.stdout)
    if found["broken"]:
        raise BrokenHead("\n".join([*(f"{case}: {why}" for case, why in found["broken"].items()), said]))
    took = time.monotonic() - start
    return Block(seconds=found["seconds"], unable=found["unable"], took=took, load=os.getloadavg()[0])


def orders(number: int) -> list[tuple[str, ...]]:
    """The order of the arms in each turn of a block, the first turn's too, which is not kept."""
    return [order(ARMS, number + turn) for turn in range(TURNS + 1)]
