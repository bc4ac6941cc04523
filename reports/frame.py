"""Records as a data frame: one row per point (an arm, a metric, a place on the axes), with its interval.

Axes become columns before the fixed ones; an axis that a point lacks is missing there. The interval is that of
`ablations.evidence`, the same that the verdicts use, so that a table and a verdict cannot disagree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ablations.evidence import Estimate, NoEvidence, compare, summarise
from ablations.traced import sources_of, tracing
from bench.metrics import metric as metric_named
from bench.record import Record

POINT = ("arm", "metric", "value", "low", "high", "n", "behind", "records", "samples")


def axes_of(table: pd.DataFrame) -> list[str]:
    """The columns that are axes."""
    return [name for name in table.columns if name not in POINT]


def summary(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point: the mean over replicates, the 95% interval, n replicates, what they are, the ids of their
    records, and of a single one its samples; errors left out.

    An axis that has the name of a fixed column gets the prefix "axis_".
    """
    points: dict[tuple[Any, ...], list[Record]] = {}
    with tracing(records) as traced:
        for record in traced:
            if record.error is None:
                key = (record.arm, record.metric, tuple(sorted(record.axes.items())))
                points.setdefault(key, []).append(record)
        return _table(
            [
                _row(found[0], summarise(found), _behind(found))
                | {"samples": found[0].samples if len(found) == 1 else None}
                for found in points.values()
            ]
        )


def differences(records: Sequence[Record], metric: str, baseline: str) -> pd.DataFrame:
    """One row per point of the other arms: the paired difference of `metric` from the baseline's, over common seeds."""
    points = {
        (record.arm, tuple(sorted(record.axes.items()))): record
        for record in records
        if record.metric == metric and record.error is None and record.arm != baseline
    }
    rows = []
    with tracing(records) as traced:
        for record in points.values():
            where: dict[str, Any] = dict(record.axes)
            try:
                found = compare(traced, arm=record.arm, baseline=baseline, metric=metric, **where)
            except NoEvidence:
                continue
            rows.append(_row(record, found, f"{int(found.n)} pairs"))
    return _table(rows)


def _row(point: Record, found: Estimate, behind: str) -> dict[str, Any]:
    known = {"arm": point.arm, "metric": point.metric, "behind": behind, "records": sources_of(found.value)}
    low, high = (None if end is None else float(end) for end in (found.low, found.high))
    return _columns(point.axes) | known | {"value": float(found.value), "low": low, "high": high, "n": int(found.n)}


def _behind(records: Sequence[Record]) -> str:
    """What stands behind a point, in words: "6 seeds", "5 processes", "7 blocks of one process"."""
    first, count = records[0], len(records)
    if count == 1 and first.n > 1:
        alone = "" if first.over in ("processes", "seeds") else " of one process"
        return f"{first.n} {first.over or 'samples'}{alone}"
    kind = "seed" if metric_named(first.metric).transfers else "process"
    plural = {"seed": "seeds", "process": "processes"}[kind]
    return f"{count} {kind if count == 1 else plural}"


def _columns(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"axis_{name}" if name in POINT else name: value for name, value in axes.items()}


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in POINT))
    return pd.DataFrame(rows, columns=[*names, *POINT]).astype({"value": float, "low": float, "high": float})
