"""How often the gate errs: its whole decision replayed on recorded runs in which nothing had changed.

    python -m bench.ab --calibrate                      replay bench/ab/null_blocks.jsonl
    python -m bench.ab --record 40 --calibrate          first add 40 runs of HEAD against HEAD to it

A trial fills the time budget with recorded runs drawn with replacement, each whole and in its order, all cases of a
block together: what a run has in common stays together, and the noise is the machine's own. It looks after every block
and stops as the gate does. A false alarm is a trial in which any case is called different. For the power, one case of
the trial (each in turn) is replaced by its slow-down of real work, measured in the same blocks.

The file keeps of every block the ratios to the base, and which measuring code made them: figures of other code are
refused, since they say nothing of today's.
"""

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from statistics import fmean, median, stdev

from rich.console import Console

from bench.ab import block, cases, recording, worker
from bench.ab.block import ARMS, SLOWED, Block
from bench.ab.decide import Rate, alarms, decide, decided
from bench.ab.judge import added
from bench.fingerprint import machine_id
from bench.record import append_lines
from bench.revision import checked_out
from bench.syntax import dump, parse
from dsv3.config.rules import require

NULL_BLOCKS = Path(__file__).parent / "null_blocks.jsonl"
TRIALS = 300
COMPARED = (*ARMS[1:], *SLOWED)  # what has a ratio to the base


@dataclass(frozen=True, kw_only=True)
class NullBlock:
    """A block in which nothing had changed: by case, the ratio of each of COMPARED to the base."""

    run: str
    took: float
    load: float
    ratios: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What happened in the trials: any false alarm, a failed control, a slow-down found; and blocks per trial."""

    alarms: Rate
    withdrawn: Rate
    power: Mapping[str, Rate]
    blocks: float


def main(runs: int, blocks: int, budget: float) -> int:
    """Record runs if any are asked for, replay all of them, and print what came out."""
    require(runs >= 0, "record", runs, "must be a number of runs", "40 are in the file")
    require(blocks >= 1, "blocks", blocks, "must be at least 1", "8 is a run")
    require(budget > 0, "budget", budget, "must be above 0 seconds", "600 is the gate's own")
    for _ in range(runs):
        record(blocks, NULL_BLOCKS)
    recorded = load(NULL_BLOCKS)
    gc.freeze()  # statsmodels collects garbage at every correction: with all that scipy holds, a tenth of a second each
    show(Console(), recorded, calibrate(recorded, budget=budget, seed=0), budget)
    return 0


def record(blocks: int, path: Path) -> None:
    """Measure HEAD against HEAD in so many blocks, as the gate does, and add them to a file."""
    names = tuple(name for name, case in cases.CASES.items() if case.clock == "cpu")
    random = Random()
    run = f"{machine_id()}-{random.getrandbits(32):08x}"
    with checked_out("HEAD") as base, checked_out("HEAD") as head:
        for number in range(blocks):
            made = block.run({"base": base, "head": head, "control": base}, names, number, random)
            append_lines(path, line(run, made) + "\n")


def line(run: str, made: Block) -> str:
    """A block as a line of the file of null blocks."""
    compared = {case: [round(recording.ratio(arms, arm), 5) for arm in COMPARED] for case, arms in made.seconds.items()}
    plain = {"code": code(), "run": run, "took": round(made.took, 1), "load": round(made.load, 1), "ratios": compared}
    return json.dumps(plain, separators=(",", ":"), sort_keys=True, allow_nan=False)


def load(path: Path) -> list[NullBlock]:
    """The recorded blocks.

    Raises:
        ValueError: there are none, or other measuring code recorded them.
    """
    remedy = "python -m bench.ab --record 40"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    require(bool(lines), "null_blocks", str(path), "must hold recorded blocks", remedy)
    others = {plain["code"] for plain in lines} - {code()}
    require(
        not others, "code", sorted(others), f"must all be {code()}, today's measuring code", f"{remedy} to a new file"
    )
    return [NullBlock(**{name: plain[name] for name in ("run", "took", "load", "ratios")}) for plain in lines]


def code() -> str:
    """A digest of what measures: the cases, the worker and the design of a block; docstrings do not count."""
    design = (ARMS, block.ROUNDS, block.CALLS, block.SLOW)
    parts = [str(design), *(dump(parse(Path(str(room.__file__)))) for room in (cases, worker))]
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


def calibrate(recorded: Sequence[NullBlock], *, budget: float, seed: int, trials: int = TRIALS) -> Calibration:
    """The gate's decisions in so many trials on the recorded blocks."""
    random = Random(seed)
    names = tuple(recorded[0].ratios)
    alarmed, withdrawn, lengths = 0, 0, []
    hits = dict.fromkeys(SLOWED, 0)
    for trial in range(trials):
        drawn = fill(recorded, budget, random)
        seen = until_decided(drawn, dict.fromkeys(names, "head"))
        lengths.append(len(seen))
        alarmed += alarms(series(seen, dict.fromkeys(names, "head"))).happened > 0
        withdrawn += alarms(series(seen, dict.fromkeys(names, "control"))).happened > 0
        case = names[trial % len(names)]
        for slow in SLOWED:
            arms = {**dict.fromkeys(names, "head"), case: slow}
            hits[slow] += decide(series(until_decided(drawn, arms), arms))[case].finding == "slower"
    power = {slow: Rate(found, trials) for slow, found in hits.items()}
    return Calibration(
        alarms=Rate(alarmed, trials), withdrawn=Rate(withdrawn, trials), power=power, blocks=fmean(lengths)
    )


def fill(recorded: Sequence[NullBlock], budget: float, random: Random) -> list[NullBlock]:
    """Whole runs drawn with replacement, one after the other, as far as the budget goes."""
    runs: dict[str, list[NullBlock]] = {}
    for made in recorded:
        runs.setdefault(made.run, []).append(made)
    everything = list(runs.values())

    def drawn() -> Iterator[NullBlock]:
        while True:
            yield from random.choice(everything)

    taken: list[NullBlock] = []
    for made in drawn():
        if taken and sum(before.took for before in taken) + taken[-1].took > budget:
            return taken
        taken.append(made)
    raise AssertionError("runs are drawn without end")


def until_decided(blocks: Sequence[NullBlock], arms: Mapping[str, str]) -> Sequence[NullBlock]:
    """The blocks up to the look at which every case is decided."""
    for looked in range(1, len(blocks) + 1):
        if decided(decide(series(blocks[:looked], arms))):
            return blocks[:looked]
    return blocks


def series(blocks: Sequence[NullBlock], arms: Mapping[str, str]) -> dict[str, list[float]]:
    """The ratios of every case, each of the arm that is said to be the working tree."""
    return {case: [made.ratios[case][COMPARED.index(arm)] for made in blocks] for case, arm in arms.items()}


def show(console: Console, recorded: Sequence[NullBlock], found: Calibration, budget: float) -> None:
    """Print the spread of the recorded ratios and what happened in the trials."""
    loads = [made.load for made in recorded]
    lines = [
        f"{len(recorded)} blocks of {len({made.run for made in recorded})} runs without a change, "
        f"{median(made.took for made in recorded):.0f} s each, load {min(loads):.1f} to {max(loads):.1f}"
    ]
    for case in recorded[0].ratios:
        ratios = series(recorded, {case: "head"})[case] + series(recorded, {case: "control"})[case]
        lines.append(
            f"  {case}: median {median(ratios):.3f}, coefficient of variation {stdev(ratios) / fmean(ratios):.1%}"
        )
    lines += [
        f"in trials of {budget:.0f} s, {found.blocks:.0f} blocks:",
        f"  false alarms of the whole suite: {found.alarms}",
        f"  failed controls: {found.withdrawn}",
        *(
            f"  one case slower by {slow} ({sizes(recorded, slow)}), found: {rate}"
            for slow, rate in found.power.items()
        ),
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def sizes(recorded: Sequence[NullBlock], slow: str) -> str:
    """How large a slow-down was, in the case where it was smallest and in that where it was largest."""
    shares = [added(series(recorded, {case: "control"}), series(recorded, {case: slow})) for case in recorded[0].ratios]
    return f"measured {min(shares):+.1%} to {max(shares):+.1%}"
