"""The study of the experts' speed: its means over a grid, what its quick cell measures, and its picture."""

from dataclasses import replace
from statistics import geometric_mean

import pytest

from ablations import moe_speed
from ablations.evidence import NoEvidence
from ablations.moe_speed import CHANGES, COMPILED_PEER, LIMITED, PEER, ROWS, over_grid
from ablations.traced import Prose
from bench import expert_layers
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.moe.kernels.experts import why_not
from reports import twins
from reports.frame import summary

WHERE = provenance("full")

TIMES = {
    "transformers_compiled": 0.8,
    "kernel": 0.4,
    "looped": 0.9,
    "padded_128": 1.5,
    "padded": 2.4,
    "padded_1.2": 1.2,
    "dense": 0.5,
    "dense_compiled": 0.6,
    "dense_kernel": 0.3,
}


def kept(arm: str, value: float, seed: int, metric: str = moe_speed.METRIC, **axes: str | int) -> Record:
    point = Point(study=moe_speed.STUDY.name, arm=arm, baseline=PEER, seed=seed, axes={"device": "cpu"} | axes)
    return record(point, WHERE, Measurement(metric=metric, value=value))


def records(dtype: str = "fp32", seeds: int = 6) -> list[Record]:
    """Processes that agree; at more than 32 rows the kernel takes half the time, and the dense layers are as before."""
    where = {"width": 256, "experts": 8, "k": 2, "routing": "text", "dtype": dtype}
    times = [
        kept(arm, time / 2 if arm == "kernel" and rows > 32 else time, seed, rows=rows, **where)
        for seed in range(seeds)
        for rows in ROWS
        for arm, time in TIMES.items()
    ]
    lost = [kept(LIMITED, 0.11, seed, "drop_share", rows=rows, **where) for seed in range(seeds) for rows in ROWS]
    return times + lost


def test_the_answer_is_of_the_fastest_dense_layer_and_over_the_whole_grid() -> None:
    said = Prose.of(moe_speed.answer(records()))
    assert "In fp32 the kernel reaches 1.5 of the fastest dense layer's speed from 256 rows" in said
    assert "from 256 rows an expert on (0.92 asked) and 0.75 at 32 rows (0.65 asked)" in said
    assert "2.5 times at the worst one (1 asked) and 2.5 times up to 32 rows. At 32 rows" in said
    assert "it is 3.75 times as fast as the layer that fills them up to 128 (1.3 asked)" in said
    assert (
        "as it is or compiled, it is 2.828 times as fast over all shapes, 2 times at the worst one and 2 times" in said
    )
    without_compiling = moe_speed.answer([row for row in records() if not row.arm.endswith("_compiled")])
    assert without_compiling in moe_speed.answer(records())
    whole = geometric_mean([2.5, 2.5, 5.0, 5.0])
    assert over_grid(records(), "fp32", lambda point: 1 / point["kernel"], lambda _: True).value == pytest.approx(whole)
    assert "bf16" not in said
    both = moe_speed.answer(records() + records("bf16"))
    assert "In bf16 the kernel reaches 1.5 of the fastest dense layer's speed from 256 rows an expert on (0.85" in both
    assert "2.5 times up to 32 rows (1.6 asked)" in both


def test_a_capacity_turns_padding_into_speed_on_routing_of_text_alone() -> None:
    said = Prose.of(moe_speed.answer(records()))
    gained = "a capacity of 1.2 are 2 times as fast as up to the fullest expert, for 11% of the pairs dropped"
    assert f"{gained}; the kernel, which drops none, is 4.24" in said
    assert moe_speed.FACTOR == expert_layers.FACTOR
    balanced = [replace(row, axes={**row.axes, "routing": "balanced"}) for row in records()]
    assert "capacity" not in moe_speed.answer(balanced)
    assert said == Prose.of(moe_speed.answer(records() + [row for row in balanced if row.arm == LIMITED]))


def test_the_peers_faster_mode_is_chosen_at_each_shape() -> None:
    """Compiled it is the faster one at 512 rows alone."""
    rows = [row for row in records() if (row.arm, row.axes["rows"]) != (COMPILED_PEER, 512)]
    rows = [replace(row, value=1.2) if row.arm == COMPILED_PEER else row for row in rows]
    rows += [row for row in records() if (row.arm, row.axes["rows"]) == (COMPILED_PEER, 512)]
    said = Prose.of(moe_speed.answer(rows))
    whole = geometric_mean([2.5, 2.5, 5.0, 4.0])
    assert f"it is {whole:.4g} times as fast over all shapes, 2.5 times at the worst one and 2.5 times up to 32" in said


def test_one_process_has_no_interval_and_the_answer_says_so_once_a_format() -> None:
    said = Prose.of(moe_speed.answer(records(seeds=1)))
    assert said.startswith("In fp32, of one process and so without intervals, the kernel reaches 1.5 of ")
    assert "no interval)" not in said
    assert "intervals" not in Prose.of(moe_speed.answer(records()))


def test_a_point_that_lacks_an_arm_counts_for_nothing() -> None:
    rows = [row for row in records() if (row.arm, row.axes["rows"]) != ("dense", 512)]
    many = over_grid(rows, "fp32", lambda point: point["kernel"], lambda number: number >= 256)
    assert many.value == pytest.approx(0.2)
    with pytest.raises(NoEvidence, match="no point in fp32 has all arms"):
        moe_speed.over_grid(rows, "fp32", lambda point: 1.0, lambda number: number == 512)
    with pytest.raises(NoEvidence, match="has not been timed"):
        moe_speed.answer([])


def test_the_quick_cell_times_every_arm_against_the_peer() -> None:
    (cell,) = moe_speed.cells("quick")
    rows = moe_speed.measure(cell)
    lost = [row for row in rows if row.measurement is not None and row.measurement.metric == "drop_share"]
    assert [(row.arm, row.axes["rows"]) for row in lost] == [(LIMITED, 32), (LIMITED, 256)]
    rows = [row for row in rows if row not in lost]
    assert {(row.arm, row.axes["rows"]) for row in rows} == {
        (arm, number) for arm in CHANGES if arm != PEER for number in (32, 256)
    }
    timed = [row for row in rows if row.measurement is not None]
    assert all(row.measurement is not None and row.measurement.value > 0 for row in timed)
    pending = {row.arm: row.pending for row in rows if row.measurement is None}
    assert {"transformers_compiled", "dense_compiled"} == {
        arm for arm, why in pending.items() if "compiling" in str(why)
    }
    if why_not() is None:
        assert len(pending) == 2


def test_a_process_goes_over_the_whole_grid() -> None:
    cells = [cell for cell in moe_speed.cells("full") if cell.seed == 0]
    assert {(cell.axes["width"], cell.axes["experts"], cell.axes["dtype"]) for cell in cells} == {
        (width, experts, dtype) for width in (256, 1024) for experts in (8, 64, 128) for dtype in ("fp32", "bf16")
    }


def test_the_picture_has_a_panel_for_each_format_and_the_dense_limit() -> None:
    picture = moe_speed.speeds(summary(records() + records("bf16")))
    assert [axes.get_title() for axes in picture.axes] == ["fp32", "bf16"]
    lines = {line.get_label(): line for line in picture.axes[0].get_lines()}
    assert list(lines["kernel"].get_ydata()) == pytest.approx([0.75, 0.75, 1.5, 1.5])
    assert list(lines[PEER].get_ydata()) == pytest.approx([0.3] * 4)
    assert list(lines["dense"].get_ydata()) == [1.0, 1.0]
    assert picture.axes[0].get_ylim() == picture.axes[1].get_ylim()
    assert twins.of_picture(picture, "speed")
    with pytest.raises(NoEvidence):
        moe_speed.speeds(summary(records()).iloc[:0])
