"""The study of what sparse attention finds: what its arms share, a cell of it, and what it makes of records."""

import ast
import math

import pytest

from ablations import STUDIES
from ablations.attention_quality import BRANCHING, EXEMPT, LENGTH, MARGIN, SEEN, STUDY, answer, measure, selects
from ablations.catalogue import load
from ablations.cell import to_record
from ablations.code import ROOT
from ablations.evidence import NoEvidence, seeds_needed
from ablations.study import Cell
from ablations.traced import Prose
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.recall_tasks import ROWS, Task
from bench.recall_training import TAPS
from bench.record import Record
from dsv3.config import Auto, Blocks, Hierarchical, Indexer, PerHead, Window, vary

WHERE = provenance("full")


def kept(arm: str, task: str, accuracy: float, seed: int, metric: str = "accuracy", steps: int = 500) -> Record:
    where = {"device": "cpu", "task": task, "length": LENGTH, "steps": steps}
    point = Point(study=STUDY.name, arm=arm, baseline="dense", seed=seed, axes=where)
    return record(point, WHERE, Measurement(metric=metric, value=accuracy))


def records(lost: float, dense: float = 0.999) -> list[Record]:
    rows = []
    for seed in range(8):
        noise = 0.0001 * (seed % 3)
        for task in ("recall", "counting"):
            rows += [kept("dense", task, dense, seed), kept("window", task, 0.02, seed)]
        rows += [
            kept("best_first", "recall", dense - lost + noise, seed),
            kept("best_first", "counting", dense - 0.2, seed),
            kept("best_first", "recall", 0.234, seed, metric="selection_share"),
            kept("hierarchical", "recall", dense - 0.3, seed),
        ]
    return rows


def test_it_is_run_by_its_path_and_has_the_seeds_that_its_comparisons_need() -> None:
    assert STUDY.name not in STUDIES
    assert load(str(ROOT / "ablations" / "attention_quality.py")).name == STUDY.name
    assert STUDY.seeds["full"] >= seeds_needed(len(STUDY.arms) - 1)
    cells = STUDY.cells("full")
    assert {(cell.arm, cell.axes["task"]) for cell in cells} == {
        (arm.name, task) for arm in STUDY.arms for task in ROWS
    }
    assert len(cells) == len(STUDY.arms) * len(ROWS) * STUDY.seeds["full"]
    assert max(cell.seconds for cell in (*cells, *STUDY.cells("quick"))) <= 120


def test_no_arm_of_a_study_of_quality_sees_more_keys_where_that_is_faster() -> None:
    """`Auto` is for speed: what it sees depends on the machine that was measured. No study may even name it."""
    assert not [arm for arm, select in selects(LENGTH).items() if isinstance(select, Auto)]
    for path in sorted((ROOT / "ablations").glob("*.py")):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        named = {name.name for node in imports for name in node.names}
        assert not named & {"Auto", "auto"}, path.name


def test_every_task_but_the_exempt_one_is_compared_within_a_point() -> None:
    assert [compared.where["task"] for compared in STUDY.compared] == [task for task in ROWS if task not in EXEMPT]
    assert {compared.margin for compared in STUDY.compared} == {MARGIN} == {0.01}
    assert EXEMPT == ("counting",)


def test_sparse_arms_see_as_many_keys_and_differ_in_the_choice_alone() -> None:
    found = selects(LENGTH)
    window, head, flat, tree = (found[arm] for arm in ("window", "per_head", "blocks", "hierarchical"))
    assert found["best_first"] == vary(tree, search="best_first")
    assert isinstance(window, Window)
    assert isinstance(head, PerHead)
    assert isinstance(flat, Blocks)
    assert isinstance(tree, Hierarchical)
    assert window.size == head.k == SEEN * flat.block_k == SEEN * tree.block_k == LENGTH // 8
    assert flat.block_q == tree.block_q == 1
    assert LENGTH // tree.block_k >= SEEN * BRANCHING**2, "two levels of the tree prune"
    task, two_layers = Task(name="recall", length=LENGTH), 2 * (window.size - 1 + TAPS - 1)
    assert two_layers < task.asking.start - task.telling[-1], "a window does not reach from a question to what was told"
    dense = STUDY.configs["dense"]
    indexer = found.pop("indexer")
    assert isinstance(indexer, Indexer)
    assert indexer.index_topk == window.size
    assert vary(dense, **{"model.attention": STUDY.configs["indexer"].model.attention}) == STUDY.configs["indexer"]
    for arm, select in found.items():
        assert vary(dense, **{"model.attention.select": select}) == STUDY.configs[arm]


@pytest.mark.parametrize("arm", [arm.name for arm in STUDY.arms])
def test_a_cell_measures_its_arm(arm: str) -> None:
    axes = {"task": "recall", "length": 256, "steps": 2}
    cell = Cell(arm=arm, seed=0, axes=axes, seconds=1.0, timed=False)
    rows = [to_record(STUDY, cell, reading, provenance("quick"), None) for reading in measure(cell)]
    found = {row.metric: row.value for row in rows}
    assert list(found) == list(STUDY.metrics)
    assert found["steps_to_criterion"] == 2, "nothing is learnt in two steps"
    assert 0.0 <= float(found["accuracy"] or 0) < 0.2
    share = 1.0 if arm == "dense" else 1 / 4 - 1 / 64 + 1 / 256**2  # about 2 f - f^2 of the triangle, f = 1/8
    assert math.isclose(float(found["selection_share"] or 0), share, abs_tol=0.015)
    assert arm == "dense" or float(found["selection_share"] or 0) <= 0.25


def test_a_training_that_diverges_is_a_failed_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import recall_training

    def diverge(*_: object, **__: object) -> None:
        raise FloatingPointError("loss=nan at step 7")

    monkeypatch.setattr(recall_training, "learn", diverge)
    axes = {"task": "recall", "length": 256, "steps": 2}
    (reading,) = measure(Cell(arm="dense", seed=0, axes=axes, seconds=1.0))
    assert (reading.metric, reading.failed) == ("accuracy", "loss=nan at step 7")


def test_the_answer_says_first_what_dense_attention_did_not_learn_and_what_is_not_shown() -> None:
    text = Prose.of(answer(records(0.004)))
    assert text.startswith(
        "Asked, and not shown: to lose less than 1% beside counting (down a tree of means on recall); to "
        "lose less than 5% (down a tree of bounds on counting; down a tree of means on recall). With 23.4% of the"
    ), text
    for words in ("bounds: recall 0.391 [", "counting 20; the most on recall"):
        assert words in text, text
    assert text.index("Down a tree of means: recall 30;") < text.index("Down a tree of bounds"), (
        "who loses most is first"
    )
    assert Prose.of(answer(records(0.004, dense=0.9))).startswith(
        "Dense attention itself stays below 99% on recall (90%)"
    )


def test_nothing_is_missed_where_every_interval_lies_below_what_may_be_lost() -> None:
    kinds = ("dense", "window", "best_first")
    mild = [row for row in records(0.004) if row.arm in kinds and row.axes["task"] != "counting"]
    assert Prose.of(answer(mild)).startswith("With 23.4% of the visible pairs")
    one = [row for row in mild if row.seed == 0]
    assert "to lose less than 1% beside counting (down a tree of bounds on recall)" in Prose.of(answer(one))


def test_the_longest_training_that_both_have_counts() -> None:
    shorter = [kept(arm, "recall", 0.5, 0, steps=100) for arm in ("dense", "best_first")]
    longer = [kept("dense", "recall", 0.1, 0, steps=900)]
    assert Prose.of(answer([*longer, *records(0.004), *shorter])) == Prose.of(answer(records(0.004)))


def test_without_records_there_is_no_answer() -> None:
    with pytest.raises(NoEvidence):
        answer([kept("dense", "recall", 1.0, 0)])
