"""The study of experts on a GPU: all of it but the device, small and on a CPU, and what it says without a GPU."""

from dataclasses import replace

import pytest
import torch

from ablations import moe_gpu as gpu
from ablations.evidence import NoEvidence
from ablations.study import Cell, Reading
from bench import expert_layers
from bench.expert_layers import Shape
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, failure, record
from bench.record import Record
from dsv3.moe.kernels import triton_experts
from reports.pages import study_page

WHERE = provenance("full")
SMALL = Shape(tokens=96, hidden=64, inner=32, experts=8, k=2)
HERE = ("transformers", "looped", "dense")  # arms that a CPU has without compiling
PENDING = "pending: there is no GPU that torch can use"
TIMES = {"transformers": 6.0, "transformers_compiled": 4.0, gpu.OURS: 2.0, "dense": 1.8, "dense_compiled": 1.6}


def timed() -> list[Record]:
    """Six processes of the first shape, which agree."""
    return [
        record(
            Point(
                study=gpu.STUDY.name,
                arm=arm,
                baseline=gpu.PEER,
                seed=seed,
                axes={"device": "cuda", "shape": gpu.PUBLIC, "routing": "text", "dtype": "bf16"},
            ),
            WHERE,
            Measurement(metric=gpu.SECONDS, value=time * (1 + seed)),
        )
        for seed in range(6)
        for arm, time in TIMES.items()
    ]


def small() -> Cell:
    (cell,) = gpu.cells("quick")
    return replace(cell, seed=1)


def found(readings: list[Reading]) -> dict[tuple[str, str], float]:
    rows = [(row.arm, row.measurement) for row in readings if row.measurement is not None]
    return {(arm, measurement.metric): float(measurement.value) for arm, measurement in rows}


def test_without_a_gpu_a_cell_and_its_page_say_that_it_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (cell,) = gpu.cells("quick")
    for device in ("cpu", "cuda"):
        (reading,) = gpu.measure(replace(cell, device=device))
        assert f"pending: {reading.pending}" == PENDING
    point = Point(study=gpu.STUDY.name, arm=reading.arm, baseline=gpu.PEER, seed=0, axes={"device": "cpu"})
    page = study_page(gpu.STUDY, [failure(point, WHERE, reading.metric, PENDING)], {})
    assert page.answers == ("Pending: no cell could be measured; see why below.",)


def test_with_a_gpu_every_arm_is_timed_there_at_the_cells_shape_for_both_routings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_experts, "why_not", lambda device: None)
    seen: list[tuple[Shape, str]] = []

    def note(cell: Cell, shape: Shape, names: tuple[str, ...], routed: str) -> list[Reading]:
        assert names == tuple(gpu.CHANGES)
        seen.append((shape, routed))
        return []

    monkeypatch.setattr(gpu, "timed", note)
    (cell,) = gpu.cells("quick")
    (reading,) = gpu.measure(cell)
    assert "--device cuda" in str(reading.pending)
    assert gpu.measure(replace(cell, device="cuda")) == []
    assert seen == [(Shape(8192, 2048, 768, 128, 8), routed) for routed in ("text", "balanced")]


def test_the_full_profile_has_deepseeks_shape_too() -> None:
    shapes = {cell.axes["shape"] for cell in gpu.cells("full")}
    assert shapes == {gpu.PUBLIC, gpu.DEEPSEEK} == gpu.WORDS.keys() == gpu.ASKED.keys()
    assert len(gpu.cells("full")) == 2 * gpu.SEEDS["full"]


@pytest.mark.parametrize("routed", gpu.ROUTINGS)
def test_a_small_shape_times_all_arms_against_the_peer(routed: str) -> None:
    readings = gpu.timed(small(), SMALL, HERE, routed)
    assert {row.axes["routing"] for row in readings} == {routed}
    values = found(readings)
    assert values.keys() == {(arm, gpu.SECONDS) for arm in HERE} | {(arm, gpu.RATIO) for arm in HERE[1:]}
    assert min(values.values()) > 0


def test_nothing_is_timed_where_an_arm_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = expert_layers.DISPATCHES["looped"]
    dispatches = {**expert_layers.DISPATCHES, "looped": lambda *given, **rest: wrong(*given, **rest) + 1000}
    monkeypatch.setattr(expert_layers, "DISPATCHES", dispatches)
    (reading,) = gpu.timed(small(), SMALL, HERE, "text")
    assert "looped" in str(reading.failed)


def test_the_answer_is_of_the_peers_and_the_dense_layers_faster_mode() -> None:
    said = gpu.answer(timed())
    assert "routed as text is: our kernel is 2 times as fast as transformers in its faster mode (1.3 asked)" in said
    assert "and has 0.8 [0.8, 0.8] of the speed of a dense layer of as many FLOPs." in said
    assert "DeepSeek" not in said
    assert study_page(gpu.STUDY, timed(), {}).answers == (said,)
    with pytest.raises(NoEvidence, match="nothing was timed"):
        gpu.answer([row for row in timed() if row.arm != "dense_compiled"])
