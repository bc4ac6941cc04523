"""How often the gate errs: its whole decision replayed on recorded runs in which nothing had changed.

    python -m bench.ab --calibrate                      replay bench/ab/null_blocks.jsonl
    python -m bench.ab --calibrate --write              and state what came out in bench/README.md
    python -m bench.ab --record 40 --calibrate          first add 40 runs of HEAD against HEAD to it

A trial fills the time budget with recorded runs drawn with replacement, each whole and in its order, all cases of a
block together: what a run has in common stays together, and the noise is the machine's own. It looks after every block
and stops as the gate does. A false alarm is a trial in which any case is called different. For the power, one case of
the trial (each in turn) is replaced by its slow-down of real work, measured in the same blocks.

The file keeps of every block the ratios to the base, and which measuring code made them: figures of other code are
refused, since they say nothing of today's.
"""

import ast
import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from statistics import fmean, median, stdev
from types import ModuleType

from bench.ab import block, cases, recording, turns, worker
from bench.ab.block import Block
from bench.ab.decide import ALPHA, MARGIN, Rate, alarms, decide, decided
from bench.ab.judge import added
from bench.ab.turns import ARMS, SLOWED
from bench.fingerprint import machine_id
from bench.glossary import README, between
from bench.meters import paired
from bench.record import append_lines
from bench.revision import checked_out
from bench.syntax import dump, parse
from dsv3.config.rules import require

NULL_BLOCKS = Path(__file__).parent / "null_blocks.jsonl"
TRIALS = 300
BUSY = 8  # the load average from which a run stands in the second column too
BEGIN = "<!-- begin calibration: python -m bench.ab --calibrate --write -->"
END = "<!-- end calibration -->"
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


def main(runs: int, blocks: int, budget: float, *, write: bool = False) -> int:
    """Record runs if any are asked for, replay all of them, and print what came out, into the README too if asked."""
    require(runs >= 0, "record", runs, "must be a number of runs", "40 are in the file")
    require(blocks >= 1, "blocks", blocks, "must be at least 1", "4 is a run")
    require(budget > 0, "budget", budget, "must be above 0 seconds", "600 is the gate's own")
    for _ in range(runs):
        record(blocks, NULL_BLOCKS)
    recorded = load(NULL_BLOCKS)
    gc.freeze()  # statsmodels collects garbage at every correction: with all that scipy holds, a tenth of a second each
    found = {name: calibrate(runs, budget=budget, seed=0, trials=TRIALS) for name, runs in groups(recorded).items()}
    text = stated(recorded, found, budget)
    print(text, end="")
    if write:
        README.write_text(between(README.read_text(), BEGIN, END, text))
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
    """A digest of what measures: the cases, the turns, their order and their ratio; docstrings do not count."""
    rooms = [parse(Path(str(room.__file__))) for room in (cases, worker, turns)]
    parts = [_definition(block, "orders"), _definition(paired, "order"), _definition(recording, "ratio")]
    return sha256("\n".join(dump(tree) for tree in (*rooms, *parts)).encode()).hexdigest()[:12]


def _definition(room: ModuleType, name: str) -> ast.FunctionDef:
    """A function of a file."""
    found = (node for node in parse(Path(str(room.__file__))).body if isinstance(node, ast.FunctionDef))
    return next(node for node in found if node.name == name)


def calibrate(recorded: Sequence[NullBlock], *, budget: float, seed: int, trials: int) -> Calibration:
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


def groups(recorded: Sequence[NullBlock]) -> dict[str, list[NullBlock]]:
    """All blocks, and those of the runs on a busy machine, if any are."""
    loads: dict[str, list[float]] = {}
    for made in recorded:
        loads.setdefault(made.run, []).append(made.load)
    busy = [made for made in recorded if fmean(loads[made.run]) >= BUSY]
    found = {"all runs": list(recorded)}
    if busy:
        found[f"{len({made.run for made in busy})} at load {BUSY} or more"] = busy
    return found


def stated(recorded: Sequence[NullBlock], found: Mapping[str, Calibration], budget: float) -> str:
    """What happened in the trials on each group of runs, and the spread of the recorded ratios, as Markdown."""
    loads = [made.load for made in recorded]
    lengths = Counter(made.run for made in recorded).values()
    each = list(found.values())

    def row(what: str, rates: Iterable[object]) -> str:
        return f"| {what} | {' | '.join(map(str, rates))} |"

    lines = [
        f"{len(recorded)} blocks without a change in {len(lengths)} runs of {min(lengths)} to {max(lengths)}, "
        f"{median(made.took for made in recorded):.0f} s each, load {min(loads):.1f} to {max(loads):.1f}. "
        f"The margin is {MARGIN:.0%}, and a run may err in {ALPHA:.0%}. A trial takes {budget:.0f} s at most:",
        "",
        row("in a trial", found),
        row("---", ["---"] * len(each)),
        row("blocks until all cases are decided or the time is spent, mean", (f"{of.blocks:.0f}" for of in each)),
        row("a false alarm in any case", (of.alarms for of in each)),
        row("a failed control", (of.withdrawn for of in each)),
        *(
            row(f"one case slower by {slow} ({sizes(recorded, slow)}), found", (of.power[slow] for of in each))
            for slow in SLOWED
        ),
        "",
        "| case | head/base | control/base | coefficient of variation |",
        "|---|---|---|---|",
        *(f"| `{case}` | {spread(recorded, case)} |" for case in recorded[0].ratios),
    ]
    return "\n".join(lines) + "\n"


def spread(recorded: Sequence[NullBlock], case: str) -> str:
    """The medians of what should be 1, and how far both scatter."""
    head, control = (series(recorded, {case: arm})[case] for arm in ("head", "control"))
    both = head + control
    return f"{median(head):.3f} | {median(control):.3f} | {stdev(both) / fmean(both):.1%}"


def sizes(recorded: Sequence[NullBlock], slow: str) -> str:
    """How large a slow-down was, in the case where it was smallest and in that where it was largest."""
    shares = [added(series(recorded, {case: "control"}), series(recorded, {case: slow})) for case in recorded[0].ratios]
    return f"measured {min(shares):+.1%} to {max(shares):+.1%}"
