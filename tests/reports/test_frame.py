import random
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations.evidence import mean
from bench.metrics import METRICS
from bench.record import Record
from reports.frame import POINT, axes_of, differences, summary

FINITE = st.floats(-1e9, 1e9)
AXES = st.dictionaries(
    st.text(min_size=1).filter(lambda name: name not in ("arm", "baseline", "metric", "ratio", "records")),
    st.one_of(st.text(), st.integers(-(10**9), 10**9), FINITE),
    max_size=3,
)


@st.composite
def records(draw: Any) -> Record:
    row = draw(st.sampled_from(METRICS))
    failed = draw(st.booleans())
    low, high = sorted((draw(FINITE), draw(FINITE)))
    return Record(
        study="s",
        arm=draw(st.sampled_from(("a", "b"))),
        baseline="a",
        seed=draw(st.none() | st.integers(0, 9)),
        metric=row.name,
        unit=row.unit,
        noise=row.noise,
        value=None if failed else draw(FINITE),
        n=0 if failed else 1,
        interval=None if failed or draw(st.booleans()) else (low, high),
        error="lost" if failed else None,
        machine="m",
        revision="r",
        profile="quick",
        time="t",
        axes=draw(AXES),
    )


def row(value: float, **more: Any) -> Record:
    known = {"study": "s", "metric": "loss", "unit": "nat/token", "noise": "absolute", "machine": "m", "revision": "r"}
    return Record(**{**known, "arm": "a", "seed": 0, "n": 1, "profile": "full", "time": "t", "value": value, **more})


@given(st.lists(records(), max_size=8))
def test_a_summary_has_each_point_once_and_no_error(rows: list[Record]) -> None:
    table = summary(rows)
    points = {(r.arm, r.metric, tuple(sorted(r.axes.items()))) for r in rows if r.error is None}
    assert len(table) == len(points)
    assert table["value"].notna().all()
    for _, line in table.iterrows():
        axes = {name: line[name] for name in axes_of(table) if not pd.isna(line[name])}
        place = tuple(
            sorted((name.removeprefix("axis_") if name[5:] in POINT else name, v) for name, v in axes.items())
        )
        assert (line["arm"], line["metric"], place) in points


def test_a_point_of_one_record_has_its_samples_and_one_of_several_none() -> None:
    alone = row(2.0, n=2, samples=(1.0, 3.0), axes={"expert": 0})
    table = summary([alone, *(row(1.0, seed=seed, n=1, samples=(1.0,), axes={"expert": 1}) for seed in (0, 1))])
    assert table["samples"].tolist() == [(1.0, 3.0), None]
    assert axes_of(table) == ["expert"]


@given(st.lists(FINITE, min_size=2, max_size=8), st.randoms())
def test_a_summary_is_the_mean_with_its_interval_in_any_order(values: list[float], chance: random.Random) -> None:
    rows = [row(value, seed=seed, metric="loss_gap") for seed, value in enumerate(values)]
    chance.shuffle(rows)
    line = summary(rows).iloc[0]
    expected = mean(values)
    assert line["value"] == pytest.approx(expected.value)
    assert (line["low"], line["high"]) == pytest.approx((expected.low, expected.high), nan_ok=True)
    assert line["behind"] == f"{len(values)} seeds"


def test_what_stands_behind_a_point_is_said_in_words() -> None:
    time = {"metric": "forward_cpu_ratio", "unit": "ratio", "noise": "paired"}
    assert summary([row(1.0)]).iloc[0]["behind"] == "1 seed"
    assert summary([row(1.0, n=7, over="blocks", **time)]).iloc[0]["behind"] == "7 blocks of one process"
    assert summary([row(1.0, seed=seed, **time) for seed in range(5)]).iloc[0]["behind"] == "5 processes"


def test_differences_pair_the_seeds_of_each_point() -> None:
    rows = [row(v, seed=s, axes={"length": n}) for n in (1, 2) for s, v in enumerate((1.0, 2.0))]
    rows += [row(v + n, arm="b", seed=s, axes={"length": n}) for n in (1, 2) for s, v in enumerate((1.0, 2.0))]
    table = differences(rows, "loss", "a")
    assert axes_of(table) == ["length"]
    assert list(zip(table["length"], table["value"], table["behind"], strict=True)) == [
        (1, 1.0, "2 pairs"),
        (2, 2.0, "2 pairs"),
    ]


def test_an_axis_named_like_a_column_keeps_apart() -> None:
    table = summary([row(1.0, axes={"n": 5})])
    assert table.iloc[0]["axis_n"] == 5
    assert table.iloc[0]["n"] == 1


def test_no_records_make_an_empty_frame() -> None:
    assert summary([]).empty
    assert differences([], "loss", "a").empty
