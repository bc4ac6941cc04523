"""The command line: `python -m bench.budget --preset NAME | --hf-config DIR`, and what to ask of it.

Exit code 0: done; 1: analytic and traced figures differ by more than a hundredth, or peaks, by arithmetic, trace and
allocator, by more than a twentieth; 2: a question that has no answer.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from bench import fingerprint
from bench.budget.activations import POLICIES
from bench.budget.asked import Asked, checkpoint, figures, preset, replica_figures, replicas
from bench.budget.records import answered, records
from bench.budget.show import agreement, at_peak, deviation, of_ranks, of_runs, of_the_model, replica
from bench.budget.splits import SCHEDULES, Split
from bench.budget.states import RECIPES, recipe
from bench.record import append
from dsv3.config import Everything, presets

FITS = 2 * 2**30  # bytes of a step that is also run on real memory
EXACT, PEAK, OF_PEAK = 0.01, "live_bytes", 0.05
SCRATCH_SHOWN = 4
Answers = Mapping[str, Mapping[str, int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer, print, keep the records."""
    chosen = parser().parse_args(arguments)
    try:
        asked = question(chosen)
        chosen.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"python -m bench.budget: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    started, provenance = time.process_time(), fingerprint.provenance("full")
    found, apart, same, device = records(asked, provenance), False, asked, None
    for table in of_the_model(asked):
        console.print(table, "")
    if chosen.trace:
        same, device, several = measured(asked, console)
        found += answered(same, device, provenance)
        found += answered(same, several, provenance, replicas(same))
        apart = differing(device, console) | differing(several, console)
    for table in (*of_ranks(asked, same, device), *of_runs(asked)):
        console.print(table, "")
    fingerprint.save(chosen.out)
    append(chosen.out / "records.jsonl", found)
    spent = time.process_time() - started
    console.print(f"{len(found)} records in {chosen.out / 'records.jsonl'}; {spent:.1f} s of CPU time")
    return 1 if apart else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.budget", description="What a training step of a model costs.")
    whose = made.add_mutually_exclusive_group(required=True)
    whose.add_argument("--preset", help=f"of {', '.join(presets.every())}")
    whose.add_argument("--hf-config", type=Path, metavar="DIR", help="a folder with the config.json of a checkpoint")
    made.add_argument("--recipe", default="bfloat16", help=f"number formats: {', '.join(row.name for row in RECIPES)}")
    made.add_argument("--recompute", default="none", help=f"what backward makes again: {', '.join(POLICIES)}")
    made.add_argument("--sequence", type=int, default=None, metavar="T", help="tokens of a sequence")
    made.add_argument("--sequences", type=int, default=1, metavar="B", help="sequences of a microbatch")
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"), ("dp", "data")):
        made.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"ways of {what} parallelism")
    made.add_argument("--zero", type=int, default=0, metavar="STAGE", help="stage of ZeRO, 0 to 3")
    made.add_argument("--microbatches", type=int, default=1, metavar="M", help="of a step, through each pipeline")
    made.add_argument("--schedule", default=SCHEDULES[0], help=f"of the pipeline: {', '.join(SCHEDULES)}")
    made.add_argument("--sequence-parallel", action="store_true", help="cut sequences between tensor-parallel parts")
    made.add_argument("--no-trace", dest="trace", action="store_false", help="arithmetic alone, without torch")
    made.add_argument("--out", type=Path, default=Path("reports/out"), help="folder for records.jsonl")
    return made


def question(chosen: argparse.Namespace) -> Asked:
    """What the command line asks.

    Raises:
        ValueError: for a model, recipe, policy or split that there is not.
    """
    given = chosen.preset is not None
    name, config = preset(chosen.preset, chosen.sequence) if given else checkpoint(chosen.hf_config, chosen.sequence)
    cuts = {kind: getattr(chosen, kind) for kind in ("tp", "pp", "ep", "dp", "zero", "microbatches")}
    return Asked(
        name=name,
        config=config,
        recipe=recipe(chosen.recipe),
        policy=chosen.recompute,
        split=Split(**cuts, sequence_parallel=chosen.sequence_parallel, schedule=chosen.schedule),
        sequences=chosen.sequences,
    )


def measured(asked: Asked, console: Console) -> tuple[Asked, Answers, Answers]:
    """What could be traced, and figures by arm of the device alone and as one of several replicas: analytic, traced,
    and for the former the allocator's where the step fits.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler logs every start and stop
    from bench.budget.agreement import real, traced, without_selection

    same = without_selection(asked)
    if not isinstance(asked.config.model.attention.select, Everything):
        console.print("A trace has no values to choose keys by. What follows is the same model with all keys visible:")
    found = traced(same)
    device: dict[str, Mapping[str, int]] = {"analytic": figures(same), "traced": found.device}
    several: Answers = {"analytic": replica_figures(same), "traced": found.replica}
    named: Mapping[str, int] = {}
    if found.device[PEAK] < FITS:
        device["allocator"], named = real(same)
    console.print(agreement(same, device), "", at_peak(same, found.at_peak), "")
    if named:
        console.print("What operators take and give back inside one call of themselves, which no trace sees:")
        for name, size in list(named.items())[:SCRATCH_SHOWN]:
            console.print(f"  scratch inside {name}: {size:,} B")
        console.print()
    console.print(replica(same, several), "")
    return same, device, several


def differing(answers: Answers, console: Console) -> bool:
    """Whether arithmetic and trace disagree, or trace and allocator in the peak, saying where."""
    pairs = [("analytic", "traced", metric, OF_PEAK if metric == PEAK else EXACT) for metric in answers["analytic"]]
    pairs += [("traced", "allocator", PEAK, OF_PEAK)]
    bad = False
    for one, other, metric, most in pairs:
        if one in answers and metric in answers.get(other, {}):
            first, second = answers[one][metric], answers[other][metric]
            if abs(deviation(first, second)) > most:
                console.print(f"{metric}: {one} {first:,} and {other} {second:,} are too far apart")
                bad = True
    return bad


if __name__ == "__main__":
    sys.exit(main())
