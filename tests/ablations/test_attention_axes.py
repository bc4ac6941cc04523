"""The study of single choices: each arm differs in one, a cell of some, and what it makes of records."""

import math

import pytest

from ablations import STUDIES
from ablations.attention_axes import ARMS, AXES, BLOCK, DEFAULT, MEANS, STUDY, TASKS, answer, measure
from ablations.attention_quality import LENGTH, SEEN, STEPS
from ablations.catalogue import load
from ablations.cell import to_record
from ablations.code import ROOT
from ablations.evidence import NoEvidence, seeds_needed
from ablations.study import Cell
from ablations.traced import Prose
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.config import Blocks, Hierarchical, vary
from dsv3.config.rules import field_names

WHERE = provenance("full")


def kept(arm: str, task: str, accuracy: float, seed: int, steps: int = 600) -> Record:
    where = {"device": "cpu", "task": task, "length": LENGTH, "steps": steps}
    point = Point(study=STUDY.name, arm=arm, baseline="default", seed=seed, axes=where)
    return record(point, WHERE, Measurement(metric="accuracy", value=accuracy))


def records() -> list[Record]:
    shares = {"default": 0.99, "k_8": 0.9, "k_32": 0.985, "search_beam": 0.4, "learns_gated": 0.7, "learns_branch": 0.5}
    return [kept(arm, "recall", share + 0.001 * (seed % 3), seed) for arm, share in shares.items() for seed in range(6)]


def test_it_is_run_by_its_path_and_has_the_seeds_that_its_comparisons_need() -> None:
    assert STUDY.name not in STUDIES
    assert load(str(ROOT / "ablations" / "attention_axes.py")).name == STUDY.name
    assert all(STUDY.seeds["full"] >= seeds_needed(len(compared.arms)) for compared in STUDY.compared)
    cells = STUDY.cells("full")
    assert {(cell.arm, cell.axes["task"]) for cell in cells} == {(arm, task) for arm in ARMS for task in TASKS}
    assert len(cells) == len(ARMS) * len(TASKS) * STUDY.seeds["full"]
    assert all(cell.axes["steps"] == STEPS[str(cell.axes["task"])] for cell in cells)
    assert {cell.arm for cell in STUDY.cells("quick")} <= set(ARMS)


@pytest.mark.parametrize("axis", AXES)
def test_the_arms_of_an_axis_change_that_field_alone(axis: str) -> None:
    beside = MEANS if axis == "learns" else DEFAULT
    for name, (attention, _) in AXES[axis].items():
        assert name.startswith(f"{axis}_")
        assert STUDY.configs[name] == vary(STUDY.configs["default"], **{"model.attention": attention})
        select, other = attention.select, beside.select
        assert isinstance(select, Blocks)
        changed = {field for field in field_names(select) if getattr(select, field) != getattr(other, field)}
        own = {"block_k": {"block_k", "k"}, "search": set() if name == "search_flat" else {"search"}}
        assert changed == own.get(axis, {axis})
        assert isinstance(select, Hierarchical) == (name != "search_flat")
        same_heads = attention == vary(beside, select=select)
        assert same_heads == (name != "sharing_group")


def test_every_arm_is_judged_once_on_each_task_against_what_it_changes() -> None:
    for task in TASKS:
        found = {compared.baseline: compared.arms for compared in STUDY.compared if compared.where == {"task": task}}
        assert found.keys() == {"default", "search_beam"}
        assert found["search_beam"] == tuple(AXES["learns"])
        assert sorted((*found["default"], *found["search_beam"], "default")) == sorted(ARMS)


def test_the_limits_say_how_many_blocks_an_arm_is_free_to_choose() -> None:
    (said,) = (limit for limit in STUDY.limits if "left to choose" in limit)
    assert "13 in default, 29 in block_k_2, 5 in block_k_8, 1 in block_k_16, " in said
    assert "10 in block_q_16; " in said


def test_other_blocks_see_as_many_keys() -> None:
    for attention, _ in AXES["block_k"].values():
        assert isinstance(attention.select, Blocks)
        assert (attention.select.k or 0) * attention.select.block_k == SEEN * BLOCK == LENGTH // 8


@pytest.mark.parametrize("arm", ["default", "sharing_group", *AXES["learns"]])
def test_a_cell_measures_its_arm(arm: str) -> None:
    axes = {"task": "recall", "length": 128, "steps": 2}
    cell = Cell(arm=arm, seed=0, axes=axes, seconds=1.0, timed=False)
    rows = [to_record(STUDY, cell, reading, provenance("quick"), None) for reading in measure(cell)]
    found = {row.metric: row.value for row in rows}
    assert list(found) == list(STUDY.metrics)
    assert found["steps_to_criterion"] == 2, "nothing is learnt in two steps"
    # 64 of 128 keys: about 2 f - f^2 of the triangle, f = 1/2; entmax leaves some out
    share = float(found["selection_share"] or 0)
    assert share < 0.75 if arm == "learns_entmax" else math.isclose(share, 0.75, abs_tol=0.03)


def test_the_answer_names_of_each_axis_the_arm_that_differs_most() -> None:
    text = Prose.of(answer(records()))
    assert text.startswith("On recall the default answers 99.1")
    for words in ("k_8 -9", "search_beam -59", "learns_gated 30"):
        assert words in text, text
    assert "k_32" not in text
    assert "tracking" not in text


def test_the_longest_training_counts() -> None:
    shorter = [kept("default", "recall", 0.1, seed, steps=12) for seed in range(6)]
    assert Prose.of(answer([*shorter, *records()])) == Prose.of(answer(records()))


def test_without_records_there_is_no_answer() -> None:
    with pytest.raises(NoEvidence):
        answer([kept("k_8", "recall", 1.0, 0)])
