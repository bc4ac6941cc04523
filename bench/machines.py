"""Whose figures speak, where records of several machines meet in one history.

A figure that transfers (a count, a loss; `bench.metrics` says which) holds wherever it was measured, so seeds may be
gathered on whatever machine is at hand: of each point the newest speaks. A time belongs to its machine, and only those
of one machine speak: of the newest of them. Errors go with the figures that they stand for.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from bench.metrics import METRICS
from bench.record import Record


@cache
def transfers(metric: str) -> bool:
    """Whether a figure holds on other machines than its own; one that the table does not know does not."""
    return any(row.name == metric and row.transfers for row in METRICS)


def speaker(records: Sequence[Record]) -> str | None:
    """The machine that speaks: of the newest figure that belongs to its machine; of the newest figure at all, or the
    newest error, where there is none.
    """
    figures = [row for row in records if row.error is None]
    for rows in ([row for row in figures if not transfers(row.metric)], figures, records):
        if rows:
            return rows[-1].machine
    return None


def speaking(records: Sequence[Record]) -> tuple[Record, ...]:
    """The records of the machine that speaks, and of others what transfers: errors, and the newest of each figure."""
    speaks = speaker(records)
    newest = {_point(row): row for row in records if row.error is None}
    return tuple(
        row
        for row in records
        if row.machine == speaks or (transfers(row.metric) and (row.error is not None or newest[_point(row)] is row))
    )


def other_machines(records: Sequence[Record]) -> str:
    """Which machine speaks, in one sentence, and what counts of others; "" where one has left all records."""
    counts = Counter(row.machine for row in records)
    if len(counts) < 2:
        return ""
    speaks, heard = speaker(records), speaking(records)
    kept = Counter(row.machine for row in heard)
    aside = ", ".join(f"{count - kept[name]} of {name}" for name, count in counts.items() if count > kept[name])
    if not aside and all(transfers(row.metric) for row in heard):
        return f"Records of {len(counts)} machines, which hold on any."
    elsewhere = sum(count for machine, count in kept.items() if machine != speaks)
    said = [f"{speaks} speaks", *([f"{aside} stand aside"] if aside else [])]
    said += [f"{elsewhere} of others hold on any machine and count"] if elsewhere else []
    return f"Records of {len(counts)} machines: {'; '.join(said)}."


def _point(row: Record) -> tuple[object, ...]:
    return row.study, row.arm, row.seed, row.metric, row.profile, tuple(sorted(row.axes.items()))
