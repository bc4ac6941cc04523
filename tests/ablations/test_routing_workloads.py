"""The study of routing workloads: what a cell counts, its sentence, and its pictures."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ablations import routing_workloads
from ablations.evidence import NoEvidence
from ablations.routing_workloads import (
    ARMS,
    LOADS,
    MAPPED_STEPS,
    SIZES,
    STUDY,
    cells,
    layers,
    measure,
    optimum,
    placements,
)
from ablations.routing_workloads_answer import answer
from ablations.routing_workloads_pictures import PLACINGS, busiest, maps
from ablations.study import Cell, Reading
from ablations.traced import Prose
from bench import placed_loads, workload_loads
from bench.fingerprint import provenance
from bench.measurement import Point, record
from bench.placed_loads import busiest_rank
from bench.record import Record
from bench.routing_workloads import EXACT, NAMES, Workload, expected_loads
from bench.workload_sizes import Ranks
from reports import twins
from reports.frame import summary
from reports.pages import study_page

WHERE = provenance("full")
SMALL = Ranks(experts=16, ranks=2, steps=3)
CELL = Cell(arm=None, seed=0, axes={"tokens": 256}, seconds=1.0, timed=False)


def kept(readings: list[Reading], seed: int) -> list[Record]:
    found = []
    for row in readings:
        assert row.measurement is not None, row
        axes = {"device": "cpu", **CELL.axes, **row.axes}
        point = Point(study=STUDY.name, arm=row.arm, baseline=STUDY.baseline, seed=seed, axes=axes)
        found.append(record(point, WHERE, row.measurement))
    return found


@pytest.fixture(scope="module")
def readings() -> list[list[Reading]]:
    """Two seeds of the quick cell, on fewer experts, tokens and steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_workloads, "SIZES", {"quick": ((2, SMALL),)})
        patch.setattr(routing_workloads, "STEPS", {"quick": 16})
        patch.setattr(routing_workloads, "SMALL", {"quick": (12,)})
        return [measure(replace(CELL, seed=seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def records(readings: list[list[Reading]]) -> list[Record]:
    return [row for seed, found in enumerate(readings) for row in kept(found, seed)]


def workload(name: str) -> Workload:
    return Workload(name=name, tokens=256, experts=16, k=2)


def test_a_cell_is_a_seed_of_all_workloads_and_no_time_is_taken() -> None:
    assert tuple(ARMS) == NAMES
    for profile, seeds in (("quick", 2), ("full", 6)):
        every = cells(profile)  # type: ignore[arg-type]
        assert [(cell.arm, cell.seed) for cell in every] == [(None, seed) for seed in range(seeds)]
        assert not any(cell.timed for cell in every)
    (k, quick), (same, full) = SIZES["quick"][0], SIZES["full"][0]
    assert (k, 4 * quick.experts) == (same, full.experts), "quick is a quarter"


def test_every_metric_is_measured_and_no_point_twice(readings: list[list[Reading]], records: list[Record]) -> None:
    assert {row.metric for row in records} == set(STUDY.metrics)
    assert {row.arm for row in records} == set(NAMES)
    assert len({row.id for row in records}) == len(records)
    assert len(readings[1]) == len(readings[0]) - 16 * len(NAMES), "loads to draw are of the first seed"


def test_the_worst_step_is_no_better_than_the_mean_one(records: list[Record]) -> None:
    for metric in LOADS:
        for arm in NAMES:
            at = {
                (row.axes["over_steps"], row.seed): row.value
                for row in records
                if (row.arm, row.metric) == (arm, metric)
            }
            for seed in (0, 1):
                mean, worst = at["mean", seed], at["worst", seed]
                assert mean is not None
                assert worst is not None
                assert worst <= mean + 1e-9 if metric == "effective_experts" else worst >= mean - 1e-9


def test_ranks_are_those_of_the_benchmark_case_and_in_order_stands_once() -> None:
    found = {
        (row.axes["placing"], row.axes["redundant"]): row.measurement.value
        for row in placements(workload("zipf"), SMALL)
        if row.measurement is not None
    }
    plain, spare = (dict(busiest_rank(workload("zipf"), SMALL, redundant)) for redundant in (0, 2))
    del spare["in_order"]
    assert found == {(name, 0): value for name, value in plain.items()} | {
        (name, 2): value for name, value in spare.items()
    }


def test_a_check_that_fails_is_a_reading_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise AssertionError("placed: ranks have 1 tokens of 2")

    def other(*_: object, **__: object) -> float:
        raise ValueError("experts=[3]: must have all tokens or none")

    monkeypatch.setattr(placed_loads, "busiest_rank", wrong)
    monkeypatch.setattr(placed_loads, "to_optimum", wrong)
    monkeypatch.setattr(workload_loads, "squared_deviation", other)
    found = placements(workload("zipf"), SMALL) + optimum(workload("zipf"), (0,))
    found += layers(workload("zipf"), 2, (0,))[:2]
    assert [(row.metric, row.failed) for row in found] == [
        ("busiest_rank_load", "placed: ranks have 1 tokens of 2"),
        ("busiest_rank_load", "placed: ranks have 1 tokens of 2"),
        ("placement_to_optimum", "placed: ranks have 1 tokens of 2"),
        ("squared_load_deviation", "experts=[3]: must have all tokens or none"),
        ("squared_load_deviation", "experts=[3]: must have all tokens or none"),
    ]


def test_the_answer_says_what_is_uneven_what_follows_the_closed_form_and_what_placement_buys(
    records: list[Record],
) -> None:
    said = Prose.of(answer(records))
    assert said.startswith("At 16 experts, k=2 and 256 tokens a step: squared CV")
    order = [said.index(f"{arm} ") for arm in ("balanced", "zipf", "adversarial")]
    assert order == sorted(order), "from even to uneven"
    assert "binomial variances, and 0 (balanced) and 0 (adversarial), whose counts are exact." in said
    assert "The busiest of 2 ranks has so many times the mean load" in said
    assert "with 2 redundant experts, one a rank as DeepSeek-V3 has in prefilling: balanced 1, 1, 1;" in said
    assert "adversarial 2, 1, 1." in said
    assert "redundant experts, knowing the step would gain most on these: " in said
    assert "On 4 ranks of 3 slots" in said


def test_the_answer_says_no_more_than_there_are_records_of(records: list[Record]) -> None:
    with pytest.raises(NoEvidence):
        answer([])
    some = [row for row in records if row.metric in (*LOADS, "drop_floor")]
    said = Prose.of(answer(some))
    assert said.endswith("%.")
    assert "closed form" not in said
    assert "ranks" not in said


def test_a_page_has_every_picture_and_no_table_of_single_loads(records: list[Record]) -> None:
    page = study_page(STUDY, records, {})
    assert all(figure.twin for figure in page.figures)
    assert [figure.name for figure in page.figures] == [
        f"routing_workloads-{name}" for name in ("maps", "excess_cv_squared", "busiest_rank")
    ]
    captions = {table.caption for table in page.tables}
    assert "busiest rank load" in captions
    assert "load to mean" not in captions


def test_a_map_has_a_panel_a_workload_and_each_step_its_loads(records: list[Record]) -> None:
    picture = maps(summary(records))
    tables = twins.of_picture(picture, "maps")
    assert [table.caption for table in tables] == list(NAMES)
    for table in tables:
        ratios = np.array([[float(cell) for cell in row[1:]] for row in table.rows])
        assert ratios.shape == (16, MAPPED_STEPS)
        np.testing.assert_allclose(ratios.mean(axis=0), 1.0, atol=0.005)  # drawn to hundredths
        if table.caption in EXACT:
            expected = expected_loads(workload(table.caption), step=2) * 16 / 512
            assert sorted(ratios[:, 2]) == pytest.approx(sorted(expected), abs=0.005)
    drifting = next(table for table in tables if table.caption == "drifting")
    heads = {np.argmax([float(row[step]) for row in drifting.rows]) for step in (1, 17, 32)}
    assert len(heads) == 3, "its head walks"
    with pytest.raises(NoEvidence):
        maps(summary([row for row in records if row.metric != "load_to_mean"]))


def test_the_busiest_ranks_are_drawn_row_by_row_without_and_with_redundant_experts(records: list[Record]) -> None:
    plain, spare = twins.of_picture(busiest(summary(records)), "busiest")
    labels = tuple(label for label, _, _ in PLACINGS.values())
    assert plain.head == spare.head == ("row", *labels)
    assert (plain.caption, spare.caption) == ("no redundant experts", "2 redundant experts")
    assert [row[0] for row in plain.rows] == list(NAMES)
    assert [row[1] for row in plain.rows] == [row[1] for row in spare.rows], "what is in order has none"
    hot = next(row for row in plain.rows if row[0] == "hot_expert")
    shared = next(row for row in spare.rows if row[0] == "hot_expert")
    assert float(shared[2]) < float(hot[2])
    with pytest.raises(NoEvidence):
        busiest(summary([row for row in records if row.metric == "load_to_mean"]))


def test_declaring_the_study_needs_no_torch() -> None:
    code = "import sys, ablations.routing_workloads as s; s.cells('full'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
