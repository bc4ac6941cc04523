"""Whose figures speak, where records of several machines meet in one history.

A figure that transfers (a count, a loss; `bench.metrics` says which) holds wherever it was measured, so seeds may be
gathered on whatever machine is at hand: of each point the newest speaks. A time belongs to its machine, as does a loss
after so many seconds of training, and only those of one machine speak: of the newest of them. What failed elsewhere
says nothing here.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from bench.metrics import METRICS
from bench.record import Record

BUDGET = "seconds_of_training"  # the axis of what has come as far as its machine let it


def speaker(records: Sequence[Record]) -> str | None:
    """The machine that speaks: of the newest figure that belongs to its machine; of the newest figure at all, or the
    newest error, where there is none.
    """
    figures = [row for row in records if row.error is None]
    for rows in ([row for row in figures if not _transfers(row)], figures, records):
        if rows:
            return rows[-1].machine
    return None


def speaking(records: Sequence[Record]) -> tuple[Record, ...]:
    """The records of the machine that speaks, and those of others that transfer and are the newest of their points."""
    speaks = speaker(records)
    newest = {_point(row): row for row in records if row.error is None}
    return tuple(
        row for row in records if row.machine == speaks or (_transfers(row) and newest.get(_point(row)) is row)
    )


def other_machines(records: Sequence[Record]) -> str:
    """Which machine speaks, in one sentence, and what counts of others; "" where one has left all records."""
    counts = Counter(row.machine for row in records)
    if len(counts) < 2:
        return ""
    speaks = speaker(records)
    kept = Counter(row.machine for row in speaking(records))
    aside = {machine: count - kept[machine] for machine, count in counts.items() if machine != speaks}
    told = ", ".join(f"{count} of {name}" for name, count in aside.items() if count)
    if not told:
        return f"Records of {len(counts)} machines, which hold on any."
    elsewhere = sum(count for machine, count in kept.items() if machine != speaks)
    counted = f"; {elsewhere} of others hold on any machine and count" if elsewhere else ""
    return f"Records of {len(counts)} machines: {speaks}, the newest, speaks; {told} stand aside{counted}."


def _transfers(row: Record) -> bool:
    return row.metric in _transferring() and BUDGET not in row.axes


@cache
def _transferring() -> frozenset[str]:
    return frozenset(row.name for row in METRICS if row.transfers)


def _point(row: Record) -> tuple[object, ...]:
    return row.study, row.arm, row.seed, row.metric, row.profile, tuple(sorted(row.axes.items()))
