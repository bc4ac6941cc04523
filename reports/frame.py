"""Records as data frames: one row per record, and one row per point (an arm, a metric, a place on the axes) with its
interval.

Axes become columns of their own, after the fixed ones; an axis that a record lacks is missing there. The interval of a
point is that of `ablations.evidence`, the same that the verdicts use.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ablations.evidence import Estimate, NoEvidence, compare, summarise
from bench.metrics import metric as metric_named
from bench.record import Record

FIXED = (
    "id",
    "study",
    "arm",
    "baseline",
    "seed",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "over",
    "unit",
    "noise",
    "profile",
    "machine",
    "revision",
    "time",
    "config",
    "corpus",
    "rule",
    "error",
)
POINT = ("arm", "metric", "value", "low", "high", "n", "behind")


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record; an axis that has the name of a fixed column gets the prefix "axis_"."""
    rows = []
    for record in records:
        low, high = record.interval or (None, None)
        known = {name: getattr(record, name) for name in FIXED if name not in ("low", "high")}
        rows.append(known | {"low": low, "high": high} | _columns(record.axes))
    names = [*FIXED, *dict.fromkeys(name for row in rows for name in row if name not in FIXED)]
    return pd.DataFrame(rows, columns=names)


def axes_of(table: pd.DataFrame) -> list[str]:
    """The columns of a frame or a summary that are axes."""
    return [name for name in table.columns if name not in (*FIXED, *POINT)]


def summary(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point: its axes, the mean over replicates, the 95% interval, n replicates, and what they are."""
    points: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.error is None:
            key = (record.arm, record.metric, tuple(sorted(record.axes.items())))
            points.setdefault(key, []).append(record)
    return _table([_row(found[0], summarise(found), _behind(found)) for found in points.values()])


def differences(records: Sequence[Record], metric: str, baseline: str) -> pd.DataFrame:
    """One row per point of the other arms: the paired difference of `metric` from the baseline's, over common seeds."""
    points = {
        (record.arm, tuple(sorted(record.axes.items()))): record
        for record in records
        if record.metric == metric and record.error is None and record.arm != baseline
    }
    rows = []
    for record in points.values():
        where: dict[str, Any] = dict(record.axes)
        try:
            found = compare(records, arm=record.arm, baseline=baseline, metric=metric, **where)
        except NoEvidence:
            continue
        rows.append(_row(record, found, f"{found.n} pairs"))
    return _table(rows)


def _row(point: Record, found: Estimate, behind: str) -> dict[str, Any]:
    known = {"arm": point.arm, "metric": point.metric, "behind": behind}
    return _columns(point.axes) | known | {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def _behind(records: Sequence[Record]) -> str:
    """What stands behind a point, in words: "6 seeds", "5 processes", "7 blocks of one process"."""
    first, count = records[0], len(records)
    if count == 1 and first.n > 1:
        return f"{first.n} {first.over or 'samples'} of one process"
    kind = "seed" if metric_named(first.metric).transfers else "process"
    plural = {"seed": "seeds", "process": "processes"}[kind]
    return f"{count} {kind if count == 1 else plural}"


def _columns(axes: Any) -> dict[str, Any]:
    return {f"axis_{name}" if name in (*FIXED, *POINT) else name: value for name, value in axes.items()}


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in POINT))
    return pd.DataFrame(rows, columns=[*names, *POINT]).astype({"value": float, "low": float, "high": float})
