"""The paired timing gate: is the working tree slower than a revision of it?

    python -m bench.ab main                            compare the working tree with main
    python -m bench.ab main -k step_base -k decode     these cases only
    python -m bench.ab main -k step_two_processes      wall time of a step on two processes
    python -m bench.ab --calibrate                     what the gate does where nothing has changed, and where 10% has

Both sides run today's cases in blocks of fresh processes that take turns (`bench.ab.turns`) until every case has a
verdict (`bench.ab.decide`) or the time budget is spent. Blocks are kept in <out>/ab/: the same command goes on where a
killed run was, and a larger budget adds to what is there. An older dsv3 that lacks what a case needs leaves it "not
comparable"; a working tree that fails where the base does not ends the run. A control, the revision against itself, and
slow-downs of real work say what the verdicts are worth here.

CPU time decides, since it does not count waiting for a core. A step on two processes is all waiting: its wall time is
compared only where it is named, on a machine with two idle cores. On a busy one it would never be decided, and keep all
the other cases waiting until the budget is spent.

Exit code 0: some case is the same and none is different; 1: a case is slower; 2: a bad command; 3: no case has a
verdict; 4: the control failed, so there are no verdicts; 5: a case is faster and none is slower; 6: the working tree
fails at a case that the base serves, or a process that measures ended.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.ab import block, recording
from bench.ab.cases import CASES
from bench.ab.decide import MARGIN, Verdict, decide, decided
from bench.ab.judge import FAILED, REFUSED, Judgement, judge
from bench.fingerprint import machine_id
from bench.revision import resolve
from dsv3.config.rules import require

DEFAULT = tuple(name for name, case in CASES.items() if case.clock == "cpu")
BY_WALL_TIME = tuple(name for name in CASES if name not in DEFAULT)
BUDGET = 600.0

Measure = Callable[[int], block.Block]


def main(arguments: list[str] | None = None) -> int:
    """Compare, or calibrate; the exit code."""
    chosen = parser().parse_args(arguments)
    try:
        if chosen.calibrate or chosen.record:
            from bench.ab import calibrate

            return calibrate.main(chosen.record, chosen.blocks, chosen.budget, write=chosen.write)
        cases = selected(chosen.cases)
        require(chosen.budget > 0, "budget", chosen.budget, "must be above 0 seconds", f"{BUDGET:.0f} is usual")
        require(bool(chosen.revision), "revision", chosen.revision, "must name the base", "python -m bench.ab main")
        return compare(resolve(chosen.revision), cases, chosen.budget, chosen.out)
    except ValueError as error:
        print(f"python -m bench.ab: {error}", file=sys.stderr)
        return REFUSED
    except block.BrokenHead as error:
        print(f"python -m bench.ab: the working tree fails where the base does not:\n{error}", file=sys.stderr)
        return FAILED
    except RuntimeError as error:
        print(f"python -m bench.ab: {error}\nThe blocks before are kept; the same command goes on.", file=sys.stderr)
        return FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.ab", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("revision", nargs="?", help="the base: a commit, branch or tag")
    made.add_argument(
        "-k",
        dest="cases",
        action="append",
        metavar="CASE",
        help=f"one of {', '.join(CASES)}; repeatable; {', '.join(BY_WALL_TIME)} (wall time) only when named",
    )
    made.add_argument("--budget", type=float, default=BUDGET, help="seconds of blocks, those on file counted (600)")
    made.add_argument("--out", type=Path, default=Path("reports/out"), help="folder of the recorded blocks")
    made.add_argument("--calibrate", action="store_true", help="replay the gate on recorded runs without a change")
    made.add_argument("--write", action="store_true", help="with --calibrate: state what came out in bench/README.md")
    made.add_argument(
        "--record", type=int, default=0, metavar="RUNS", help="first record so many runs of HEAD against HEAD"
    )
    made.add_argument("--blocks", type=int, default=4, help="blocks of a recorded run (4)")
    return made


def selected(names: list[str] | None) -> tuple[str, ...]:
    """The cases to time: those named, in the order of CASES, or all that CPU time decides.

    Raises:
        ValueError: there is no such case.
    """
    for name in names or ():
        require(name in CASES, "-k", name, f"must be one of {', '.join(CASES)}", "repeat -k for several")
    return tuple(name for name in CASES if name in names) if names else DEFAULT


def compare(commit: str, cases: tuple[str, ...], budget: float, out: Path) -> int:
    """Measure the working tree against a commit and print what came out; the exit code."""
    console = Console(width=max(Console().width, 100))  # so that a narrow terminal wraps a table and crops no verdict
    with recording.trees(commit) as trees:
        comparison = recording.Comparison(
            base=commit, head=recording.content(trees["head"]), machine=machine_id(), cases=cases
        )
        blocks, skipped = recording.load(out, comparison)
        for line in skipped:
            text = f"{comparison.path(out)}:{line.line} left out: {line.reason}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        random = Random()
        with bar(console) as progress:
            gather(
                blocks,
                measure=lambda number: block.run(trees, cases, number, random),
                keep=lambda made: recording.append(out, comparison, made),
                budget=budget,
                progress=progress,
            )
    judgement = judge(blocks)
    show(console, judgement, blocks, comparison.path(out))
    return judgement.code


def gather(
    blocks: list[block.Block],
    *,
    measure: Measure,
    keep: Callable[[block.Block], None],
    budget: float,
    progress: Progress,
) -> None:
    """Add blocks until every comparable case is decided, or the next one would not fit the budget."""
    task = progress.add_task("", total=budget)
    while not enough(blocks, budget):
        verdicts = decide(recording.ratios(blocks, "head"))
        done = sum(verdict.finding != "not enough evidence" for verdict in verdicts.values())
        text = f"block {len(blocks) + 1}, {done} of {len(verdicts)} cases decided" if blocks else "block 1"
        progress.update(task, completed=spent(blocks), description=text)
        made = measure(len(blocks))
        keep(made)
        blocks.append(made)


def enough(blocks: list[block.Block], budget: float) -> bool:
    """Whether to stop: all decided (or nothing to decide), or no time for another block like the last."""
    if not blocks:
        return False
    return decided(decide(recording.ratios(blocks, "head"))) or spent(blocks) + blocks[-1].took > budget


def spent(blocks: list[block.Block]) -> float:
    """Seconds that the blocks took."""
    return sum(made.took for made in blocks)


def bar(console: Console) -> Progress:
    """A bar of the time budget."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True)


def show(console: Console, judgement: Judgement, blocks: list[block.Block], path: Path) -> None:
    """Print the verdicts and what they are worth."""
    table = Table(box=None)
    for heading in ("case", "verdict", "head/base", "90% interval", "p", "blocks"):
        table.add_column(heading, no_wrap=True)
    for name, verdict in judgement.cases.items():
        finding = "withdrawn" if judgement.withdrawn else verdict.finding
        table.add_row(label(name), finding, *figures(verdict))
    for name in judgement.unable:
        table.add_row(label(name), "not comparable")
    console.print(table)
    console.print("\n".join(remarks(judgement, blocks, path)), highlight=False, markup=False, soft_wrap=True)


def remarks(judgement: Judgement, blocks: list[block.Block], path: Path) -> list[str]:
    """What is to be said beside the table: what is not comparable, the run's own error rates, what to do."""
    loads = [made.load for made in blocks]
    lines = [f"{name} is not comparable: {why}" for name, why in judgement.unable.items()]
    lines += [f"{len(blocks)} blocks in {spent(blocks):.0f} s, load {min(loads):.1f} to {max(loads):.1f}: {path}"]
    if not judgement.cases:
        return lines
    lines += [
        f"a difference is more than {MARGIN:.0%}; the base against itself was called different: {judgement.alarms}",
        *(f"slow-downs of {more:+.1%} found: {rate}" for more, rate in judgement.power.values()),
    ]
    if judgement.withdrawn:
        failed = ", ".join(name for name, verdict in judgement.control.items() if verdict.different)
        lines += [f"the base differs from itself in {failed}: verdicts are withdrawn; measure on a quieter machine"]
    elif not decided(judgement.cases):
        lines += ["more evidence: the same command with a larger --budget goes on from these blocks"]
    return lines


def label(name: str) -> str:
    """The case, and its clock where that is not CPU time."""
    return name if CASES[name].clock == "cpu" else f"{name} (wall)"


def figures(verdict: Verdict) -> tuple[str, str, str, str]:
    """The cells of a verdict."""
    ratio = "" if verdict.ratio is None else f"{verdict.ratio:.3f}"
    bounds = "" if verdict.interval is None else "{:.3f} to {:.3f}".format(*verdict.interval)
    return ratio, bounds, f"{verdict.p:.2g}", str(verdict.blocks)


if __name__ == "__main__":
    sys.exit(main())
