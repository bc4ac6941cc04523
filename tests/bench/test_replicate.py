"""Joining the records of fresh processes."""

from dataclasses import replace

import pytest

from bench.record import Record
from bench.replicate import across_processes

RATIO = Record(
    study="bench_layers",
    arm="ours",
    baseline="theirs",
    metric="forward_cpu_ratio",
    unit="ratio",
    noise="paired",
    value=1.0,
    n=7,
    over="blocks",
    interval=(0.9, 1.1),
    machine="m",
    revision="r",
    profile="full",
    time="now",
)
BYTES = replace(RATIO, metric="saved_bytes", unit="B", noise="exact", value=400, n=1, over=None, interval=None)


def runs(record: Record, *values: float) -> list[list[Record]]:
    return [[replace(record, value=value)] for value in values]


def test_the_joint_ratio_is_the_median_of_processes_with_their_interval() -> None:
    (joined,) = across_processes(runs(RATIO, 1.0, 1.2, 1.1, 1.3, 1.0, 1.4))
    assert joined.value == pytest.approx(1.15)
    assert (joined.n, joined.over, joined.interval) == (6, "processes", (1.0, 1.4))
    assert joined.samples == (1.0, 1.2, 1.1, 1.3, 1.0, 1.4)
    assert joined.id == RATIO.id


def test_one_process_keeps_its_own_interval() -> None:
    assert across_processes([[RATIO]]) == (RATIO,)


def test_equal_exact_figures_stay_and_unequal_ones_become_an_error() -> None:
    assert across_processes(runs(BYTES, 400, 400, 400)) == (BYTES,)
    (error,) = across_processes(runs(BYTES, 400, 401, 400))
    assert error.value is None
    assert error.error == "an exact figure differs between processes: 400, 401, 400"


def test_a_failure_in_any_process_is_what_remains() -> None:
    failed = replace(RATIO, value=None, n=0, interval=None, over=None, error="parity: off by 1")
    assert across_processes([[RATIO], [failed], [RATIO]]) == (failed,)


def test_every_figure_of_every_process_is_there_once() -> None:
    other = replace(RATIO, arm="another")
    joined = across_processes([[RATIO, BYTES], [RATIO, other, BYTES]])
    assert [record.id for record in joined] == [RATIO.id, BYTES.id, other.id]
