"""A study for tests: it tosses coins instead of training models; its environment says what to break."""

import math
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from ablations.claims import Claim, Verdict
from ablations.evidence import compare, decide, estimate
from ablations.study import Arm, Cell, Figure, Reading, Rule, Study, grid
from bench.measurement import Measurement
from bench.record import Profile, Record

SEEDS: dict[Profile, int] = {"quick": 2, "full": 6}
TOSSES: dict[Profile, tuple[int, ...]] = {"quick": (1000,), "full": (100, 1000)}
FACES = {"fair": 0.5, "bent": 0.2}


def cells(profile: Profile) -> tuple[Cell, ...]:
    return grid(
        arms=FACES, seeds=range(SEEDS[profile]), seconds=1, timed="COIN_QUIET" not in os.environ, tosses=TOSSES[profile]
    )


def measure(cell: Cell) -> list[Reading]:
    assert cell.arm is not None
    note("start", cell)
    time.sleep(float(os.environ.get("COIN_SLEEP", "0")))
    if os.environ.get("COIN_RAISES") == cell.arm:
        raise RuntimeError("the coin rolled away")
    if os.environ.get("COIN_DIES") == cell.arm:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("COIN_FAILS") == cell.arm:
        return [Reading(arm=cell.arm, metric="loss", failed="the coin stood on its edge")]
    if os.environ.get("COIN_PENDING") == cell.arm:
        return [Reading(arm=cell.arm, metric="loss", pending="no table to toss on")]
    tosses = int(cell.axes["tosses"])
    chance = random.Random(f"{cell.arm} {cell.seed} {tosses}")
    heads = sum(chance.random() < FACES[cell.arm] for _ in range(tosses)) / tosses
    if os.environ.get("COIN_NAN") == cell.arm:
        heads = math.nan
    note("end", cell)
    return [
        Reading(arm=cell.arm, measurement=Measurement(metric="loss", value=heads)),
        Reading(arm=cell.arm, measurement=Measurement(metric="peak_bytes", value=tosses)),
    ]


def note(what: str, cell: Cell) -> None:
    if "COIN_LOG" in os.environ:
        with Path(os.environ["COIN_LOG"]).open("a") as log:
            log.write(f"{what} {cell.arm} {cell.seed} {cell.axes['tosses']}\n")


def bent_is_lower(claim: Claim, records: Sequence[Record]) -> Verdict:
    lower = compare(records, arm="bent", baseline="fair", metric="loss", tosses=1000)
    return decide(lower, f"Bent coins show {lower} more heads.", at_most=-0.1)


def bytes_are_kept(claim: Claim, records: Sequence[Record]) -> Verdict:
    kept = estimate(records, arm="bent", metric="peak_bytes", tosses=1000)
    return decide(kept, f"It keeps {kept} bytes.", at_least=1000)


STUDY = Study(
    name="attention_sparsity",
    question="Which coin shows more heads?",
    arms=(Arm("fair", "half heads"), Arm("bent", "a fifth heads")),
    baseline="fair",
    metrics=("loss", "peak_bytes"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    rules=(Rule("A3", seeds=6, judge=bent_is_lower), Rule("A2", seeds=0, judge=bytes_are_kept)),
    figures=(
        Figure("heads", "Share of heads", metric="loss", x="tosses", log="x", reference=(0.5, "a fair coin")),
        Figure("gap", "Against a fair coin", metric="loss", kind="interval", against_baseline=True),
        Figure("missing", "Wear of the coin", metric="flops", x="tosses"),
    ),
    limits=("Coins are not models.",),
)
