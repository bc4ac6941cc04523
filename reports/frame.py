"""Records as data frames: one row per record, and one row per point (an arm, a metric, a place on the axes) with its interval.

Axes become columns of their own, after the fixed ones; an axis that a record lacks is missing there. The interval of a point is that of
`ablations.evidence`, the same that the verdicts use.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ablations.evidence import Estimate, NoEvidence, compare, summarise
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
POINT = ("arm", "metric", "value", "low", "high", "n")


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record; an axis whose name is that of a fixed column gets the prefix "axis_"."""
    rows = []
    for record in records:
        low, high = record.interval or (None, None)
        known = {name: getattr(record, name) for name in FIXED if name not in ("low", "high")}
        axes = {column(name): value for name, value in record.axes.items()}
        rows.append(known | {"low": low, "high": high} | axes)
    names = [*FIXED, *dict.fromkeys(name for row in rows for name in row if name not in FIXED)]
    return pd.DataFrame(rows, columns=names)


def column(axis: str) -> str:
    """The column of an axis."""
    return f"axis_{axis}" if axis in FIXED else axis


def axes_of(table: pd.DataFrame) -> list[str]:
    """The columns of a frame or a summary that are axes."""
    return [name for name in table.columns if name not in FIXED]


def summary(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point: its axes, the mean over replicates, the 95% interval, and n, the replicates behind it."""
    points: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.error is None:
            key = (record.arm, record.metric, tuple(sorted(record.axes.items())))
            points.setdefault(key, []).append(record)
    rows = [_row(arm, metric, dict(axes), summarise(found)) for (arm, metric, axes), found in points.items()]
    return _table(rows)


def differences(records: Sequence[Record], metric: str, baseline: str) -> pd.DataFrame:
    """One row per point of the other arms: the paired difference of `metric` from the baseline's, over the seeds of both."""
    points = {
        (record.arm, tuple(sorted(record.axes.items()))): None
        for record in records
        if record.metric == metric and record.error is None and record.arm != baseline
    }
    rows = []
    for arm, axes in points:
        try:
            found = compare(records, arm=arm, baseline=baseline, metric=metric, **dict(axes))
        except NoEvidence:
            continue
        rows.append(_row(arm, metric, dict(axes), found))
    return _table(rows)


def _row(arm: str, metric: str, axes: dict[str, Any], found: Estimate) -> dict[str, Any]:
    named = {column(name): value for name, value in axes.items()}
    return named | {"arm": arm, "metric": metric, "value": found.value, "low": found.low, "high": found.high, "n": found.n}


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in POINT))
    return pd.DataFrame(rows, columns=[*names, *POINT]).astype({"low": float, "high": float})
