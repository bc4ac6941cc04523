"""The study of attention on a GPU: all of it but the device, small and on a CPU, and what it says without a GPU."""

from dataclasses import replace

import pytest
import torch

from ablations import attention_gpu as gpu
from ablations.evidence import NoEvidence
from ablations.study import Cell, Reading
from bench import block_attention
from bench.attention_sizes import BLOCK, SEEN
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, failure, record
from bench.meters import paired
from bench.meters.paired import Block, Plan, Seconds
from bench.record import Record
from reports.implementations import GPU
from reports.pages import study_page

WHERE = provenance("full")
SMALL = Cell(arm=None, seed=0, axes={"length": (SEEN + 3) * BLOCK, "dtype": "bf16", "heads": 4, "width": 16}, seconds=9)
PENDING = "pending: there is no GPU that torch can use"


def timed() -> list[Record]:
    """Six processes of one length, in each of which another sharing takes 5 s where the fastest takes 1."""
    rows = []
    for seed in range(6):
        for place, sharers in enumerate(gpu.SHARING):
            number = (place + seed) % len(gpu.SHARING) + 1
            values = {gpu.RATIO: 0.02 * number, gpu.SECONDS: 1.0 * number, gpu.CHOOSING: 0.02 * number}
            axes = {"device": "cuda", "length": 65536, "heads": 32, gpu.SHARED: sharers}
            point = Point(study=gpu.STUDY.name, arm=gpu.OURS, baseline="sdpa", seed=seed, axes=axes)
            rows += [record(point, WHERE, Measurement(metric=name, value=value)) for name, value in values.items()]
    return rows


def found(readings: list[Reading]) -> dict[tuple[str, str], float]:
    rows = [(row.arm, row.measurement) for row in readings if row.measurement is not None]
    return {(arm, measurement.metric): float(measurement.value) for arm, measurement in rows}


def test_without_a_gpu_a_cell_and_its_page_say_that_it_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (cell,) = gpu.cells("quick")
    for device in ("cpu", "cuda"):
        (reading,) = gpu.measure(replace(cell, device=device))
        assert f"pending: {reading.pending}" == PENDING
    point = Point(study=gpu.STUDY.name, arm=reading.arm, baseline="sdpa", seed=0, axes={"device": "cpu"} | cell.axes)
    page = study_page(gpu.STUDY, [failure(point, WHERE, reading.metric, PENDING)], {})
    assert page.answers == ("Pending: no cell could be measured; see why below.",)
    assert page.failures is not None
    assert any(PENDING in row for row in page.failures.rows)


def test_with_a_gpu_it_is_timed_there_alone_and_for_every_number_of_key_value_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(gpu, "shared", lambda cell, sharers: seen.append((cell.device, sharers)) or [])
    (cell,) = gpu.cells("quick")
    (reading,) = gpu.measure(cell)
    assert "--device cuda" in str(reading.pending)
    assert gpu.measure(replace(cell, device="cuda")) == []
    assert seen == [("cuda", sharers) for sharers in gpu.SHARING]


def test_cells_are_of_the_lengths_and_of_heads_that_every_sharing_divides() -> None:
    full = gpu.cells("full")
    assert {cell.axes["length"] for cell in full} == {16384, 32768, 65536, 131072}
    assert len(full) == 4 * 6
    assert all(int(cell.axes["heads"]) % sharers == 0 for cell in full for sharers in gpu.SHARING)


def test_a_small_point_times_the_tree_against_the_fastest_of_torchs_kernels() -> None:
    readings = gpu.shared(SMALL, 2)
    assert {row.axes[gpu.SHARED] for row in readings} == {2}
    missing = {row.arm for row in readings if row.pending is not None}
    if gpu.OURS in missing:
        pytest.skip("there is no kernel of ours here")
    values = found(readings)
    arms = set(gpu.TORCH) - missing
    assert values["sdpa", gpu.SECONDS] == min(values[arm, gpu.SECONDS] for arm in arms)
    assert min(values[arm, gpu.RATIO] for arm in arms) == 1.0
    assert values[gpu.OURS, gpu.RATIO] > 0
    assert 0 < values[gpu.OURS, gpu.CHOOSING] < 1
    assert missing == {"cudnn", "efficient"}, "torch has but one fused kernel on a CPU"


def test_an_arm_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = block_attention.forward

    def tree_is_wrong(arm: str, given: block_attention.Inputs) -> torch.Tensor:
        return right(arm, given) + (arm == gpu.OURS)

    monkeypatch.setattr(block_attention, "forward", tree_is_wrong)
    readings = gpu.shared(SMALL, 2)
    assert found(readings) == {}
    if block_attention.why_not(gpu.OURS, block_attention.inputs(BLOCK, torch.bfloat16)) is None:
        assert [row.arm for row in readings if row.failed] == [gpu.OURS]


def test_the_fastest_kernel_of_a_point_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"flash": 3.0, "cudnn": 1.0, "efficient": 2.0, gpu.OURS: 0.5, "choosing": 0.1}

    def as_given(calls: dict[str, object], *_: object) -> Block:
        return {name: Seconds(0.0, times[name]) for name in calls}

    monkeypatch.setattr(block_attention, "why_not", lambda arm, given: None)
    monkeypatch.setattr(block_attention, "check_heads", lambda arm, given: None)
    monkeypatch.setattr(paired, "plan", lambda calls, **_: Plan(calls=dict.fromkeys(calls, 1), blocks=gpu.BLOCKS))
    monkeypatch.setattr(paired, "time_block", as_given)
    values = found(gpu.shared(SMALL, 1))
    assert values["sdpa", gpu.SECONDS] == 1.0
    assert [values[arm, gpu.RATIO] for arm in (*gpu.TORCH, gpu.OURS)] == [3.0, 1.0, 2.0, 0.5]
    assert values[gpu.OURS, gpu.CHOOSING] == pytest.approx(0.2)


def test_the_answer_is_of_the_slowest_number_of_key_value_heads_and_says_how_far_they_lie_apart() -> None:
    said = gpu.answer(timed())
    assert "At 65536 tokens forward and backward are 10 times as fast" in said
    assert "within a factor of 5, and choosing is at most 0.1 of them." in said
    page = study_page(gpu.STUDY, timed(), {})
    assert page.answers == (said,)
    with pytest.raises(NoEvidence, match="every number"):
        gpu.answer([row for row in timed() if row.axes[gpu.SHARED] != 8])
    with pytest.raises(NoEvidence):
        gpu.answer([])


def test_every_kernel_of_torchs_has_an_arm_and_a_name() -> None:
    assert gpu.TORCH.keys() == block_attention.BACKENDS.keys()
    assert {arm.name for arm in gpu.STUDY.arms} == GPU.keys()
