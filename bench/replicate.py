"""Join the records of fresh processes: one figure per question, its interval over processes.

Blocks of one process share memory layout, code alignment and the order of allocations, so their interval says how well
that process knows itself. A process is the replicate: its value is the median of its blocks, and the joint value is the
median of those, with its interval over processes (Student's below six of them).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median

from bench.interval import of_median
from bench.record import Record


def across_processes(runs: Sequence[Iterable[Record]]) -> tuple[Record, ...]:
    """One record per id from the records of several processes, in the order of the first process.

    Exact figures must agree; where they do not, the record becomes an error that shows the values. A figure that failed
    in some process is that process's error record.
    """
    gathered: dict[str, list[Record]] = {}
    for run in runs:
        for record in run:
            gathered.setdefault(record.id, []).append(record)
    return tuple(_join(found) for found in gathered.values())


def _join(found: list[Record]) -> Record:
    last = found[-1]
    failed = [record for record in found if record.error is not None]
    if failed:
        return failed[0]
    values = tuple(record.value for record in found if record.value is not None)
    if last.noise == "exact":
        return last if len(set(values)) == 1 else _disagreement(last, values)
    if len(values) == 1:
        return last
    return replace(
        last, value=median(values), n=len(values), over="processes", samples=values, interval=of_median(values)
    )


def _disagreement(record: Record, values: tuple[int | float, ...]) -> Record:
    shown = ", ".join(str(value) for value in values)
    error = f"an exact figure differs between processes: {shown}"
    return replace(record, value=None, n=0, samples=None, interval=None, over=None, error=error)
