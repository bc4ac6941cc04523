"""The study of language models: what its arms share, what a cell measures, and what it makes of records."""

from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from ablations import STUDIES
from ablations.attention_language import (
    FURTHER,
    KEYS,
    SELECTS,
    STUDY,
    answer,
    configured,
    learning,
    measure,
)
from ablations.catalogue import load
from ablations.cell import to_record
from ablations.code import ROOT
from ablations.equal_time import gap_at_equal_time
from ablations.evidence import NoEvidence, seeds_needed
from ablations.study import Cell
from ablations.traced import Prose
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.config import Blocks, Hierarchical, Window, vary
from reports import twins
from reports.frame import summary

WHERE = provenance("full")


def kept(arm: str, value: float, seed: int, metric: str = "trailing_loss", **axes: str | int) -> Record:
    where = {"device": "cpu", "part": "training", "length": 8192} | axes
    point = Point(study=STUDY.name, arm=arm, baseline="dense", seed=seed, axes=where)
    return record(point, WHERE, Measurement(metric=metric, value=value))


def look(arm: str, value: float, seed: int, steps: int) -> Record:
    return kept(arm, value, seed, at="a look", steps=steps, steps_of_dense=100)


def records() -> list[Record]:
    """Dense attention ends at 2.0 after 100 steps; a window's steps take its time, a tree's half of it."""
    rows = [
        kept(arm, ratio, seed, "step_cpu_ratio", part="step", threads=1)
        for arm, ratio in (("window", 1.0), ("hierarchical", 0.5))
        for seed in range(2)
    ]
    for seed in range(7):
        noise = 0.001 * (seed % 3)
        rows += [look("dense", 2.0, seed, 100), look("window", 2.2, seed, 100)]
        rows += [look("hierarchical", 2.1 - 0.1 * part + noise, seed, 150 + 20 * part) for part in (0, 1, 2, 3)]
        for arm, tokens in (("dense", 2.0), ("window", 2.2), ("hierarchical", 2.005 + noise)):
            rows.append(kept(arm, tokens, seed, at="equal tokens"))
        for arm, mass in (("hierarchical", 0.6), ("blocks", 0.61), ("random", 0.2)):
            for part in (1, 2):
                axes = {"tokens": 8192 // part, "of": "free keys"}
                rows.append(kept(arm, mass / part, seed, "attention_mass", **axes))
    return rows


def test_it_is_run_by_its_path_and_has_the_seeds_that_its_comparisons_need() -> None:
    assert STUDY.name not in STUDIES
    assert load(str(ROOT / "ablations" / "attention_language.py")).name == STUDY.name
    assert all(STUDY.seeds["full"] >= seeds_needed(len(compared.arms)) for compared in STUDY.compared)
    cells = STUDY.cells("full")
    assert {cell.arm for cell in cells if cell.axes["part"] == "training"} == FURTHER.keys()
    assert {cell.axes["part"] for cell in cells if cell.timed} == {"step"}, "what is learnt is no matter of the machine"


def test_sparse_arms_see_as_many_keys_and_differ_from_dense_attention_in_the_choice_alone() -> None:
    window, tree, fine = (SELECTS[arm] for arm in ("window", "hierarchical", "best_first"))
    assert isinstance(window, Window)
    assert isinstance(tree, Hierarchical)
    assert isinstance(fine, Hierarchical)
    assert tree.k is not None
    assert fine.k is not None
    assert window.size == tree.k * tree.block_k == fine.k * fine.block_k == KEYS
    dense = SELECTS["dense"]
    assert isinstance(dense, Blocks)
    assert dense.keep == 1.0
    for arm, select in SELECTS.items():
        assert vary(configured("dense", length=8192), **{"model.attention.select": select}) == STUDY.configs[arm]


def trained(arm: str) -> list[Record]:
    cell = Cell(arm=arm, seed=0, axes={"part": "training", "length": 256, "steps_of_dense": 2}, seconds=1.0)
    return [to_record(STUDY, cell, reading, provenance("quick"), None) for reading in measure(cell)]


def test_every_training_is_looked_at_where_dense_attention_ends_and_what_that_attends_to_is_weighed() -> None:
    rows = trained("dense")
    looks = {row.axes["steps"]: row.value for row in rows if row.axes.get("at") == "a look" and row.metric == "loss"}
    assert list(looks) == [1, 2]
    (equal,) = (row.value for row in rows if row.axes.get("at") == "equal tokens" and row.metric == "loss")
    assert equal == looks[2]
    masses = [row for row in rows if row.metric == "attention_mass"]
    assert {row.axes["tokens"] for row in masses} == {64, 128, 256}
    assert {row.arm for row in masses} == {"blocks", "hierarchical", "best_first", "random", "oracle", "forced"}
    assert 0.0 < fmean(float(row.value or 0) for row in masses) < 1.0
    tree = trained("hierarchical")
    assert max(int(row.axes["steps"]) for row in tree if row.axes["at"] == "a look") == 5
    assert [row.metric for row in tree if row.axes["at"] == "equal tokens"] == ["trailing_loss", "loss"]


def test_a_step_of_every_arm_is_timed_against_dense_attention() -> None:
    cell = Cell(arm=None, seed=0, axes={"part": "step", "length": 128, "threads": 1}, seconds=1.0)
    found = {(row.arm, row.measurement.metric) for row in measure(cell) if row.measurement}
    ratios = {(arm, "step_cpu_ratio") for arm in SELECTS if arm != "dense"}
    assert found == ratios | {(arm, "cpu_seconds") for arm in SELECTS}


def test_the_bigram_stands_on_the_same_text() -> None:
    cell = Cell(arm="bigram", seed=None, axes={"part": "counts", "length": 1024}, seconds=1.0)
    (row,) = measure(cell)
    assert row.measurement is not None
    assert 2.0 < row.measurement.value < 3.0, "nats per byte of English prose and Python"


def test_without_the_kernel_nothing_is_trained_or_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsv3.attention

    monkeypatch.setattr(dsv3.attention, "why_not_kernel", lambda q: "there is no C++ compiler")
    for arm, part in (("hierarchical", "training"), (None, "step")):
        axes: dict[str, Any] = {"part": part, "length": 256, "steps_of_dense": 2}
        (row,) = measure(Cell(arm=arm, seed=0, axes=axes, seconds=1.0))
        assert row.pending == "there is no C++ compiler"


def test_a_training_that_diverges_is_a_failed_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import language_training

    def diverge(*_: object, **__: object) -> None:
        raise FloatingPointError("step 3: gradient that is not finite")

    monkeypatch.setattr(language_training, "learn", diverge)
    axes = {"part": "training", "length": 256, "steps_of_dense": 2}
    (reading,) = measure(Cell(arm="window", seed=0, axes=axes, seconds=1.0))
    assert (reading.metric, reading.failed) == ("trailing_loss", "step 3: gradient that is not finite")


def test_at_equal_time_an_arm_has_read_as_much_more_as_its_steps_are_shorter() -> None:
    gap = gap_at_equal_time(records(), "hierarchical", "dense")
    assert gap.share == 1.0
    assert gap.nats.value == pytest.approx(2.1 - 0.25 + 0.006 / 7 - 2.0), "200 steps: between the looks at 190 and 210"
    with pytest.raises(NoEvidence, match="step_cpu_ratio of hierarchical"):
        gap_at_equal_time([row for row in records() if row.metric != "step_cpu_ratio"], "hierarchical", "dense")
    with pytest.raises(NoEvidence, match="dense attention was not trained"):
        gap_at_equal_time([row for row in records() if row.arm != "dense"], "hierarchical", "window")


def test_an_arm_that_was_not_trained_to_the_end_is_compared_where_it_ends() -> None:
    def ended(ratio: float) -> list[Record]:
        slower = [replace(row, value=ratio) if row.metric == "step_cpu_ratio" else row for row in records()]
        return [*slower, *(look("dense", 2.5, seed, 50) for seed in range(7))]

    gap = gap_at_equal_time(ended(0.25), "hierarchical", "dense")
    assert gap.share == pytest.approx(210 * 0.25 / 100)
    assert gap.nats.value == pytest.approx(2.1 - 0.3 + 0.006 / 7 - (2.5 - 0.5 * 2.5 / 50))
    assert gap.until == " (52% of what dense attention took in all)"
    beside = gap_at_equal_time(ended(0.25), "window", "hierarchical")
    assert beside.share == pytest.approx(100 * 0.25 / 100), "the window ends before the tree"


def test_at_equal_time_too_a_pair_has_read_one_text() -> None:
    others = [replace(row, corpus="another") if row.arm == "hierarchical" else row for row in records()]
    with pytest.raises(NoEvidence, match="no seed has looks of both hierarchical and dense on one text"):
        gap_at_equal_time(others, "hierarchical", "dense")


def test_a_quick_run_in_the_same_folder_changes_nothing() -> None:
    quick = [replace(row, axes={**row.axes, "length": 1024}, value=9.0) for row in records()]
    assert Prose.of(answer([*quick, *records()])) == Prose.of(answer(records()))


def test_the_answer_names_all_gaps_and_what_the_tree_catches_at_the_longest_text() -> None:
    text = Prose.of(answer(records()))
    for words in (
        "Compared with a window of as many keys, the trailing loss of a tree of means in nat/token is lower by 0.194 [",
        "at equal tokens and lower by 0.349 [",
        "with dense attention, higher by 0.00586 [",
        "at equal tokens and lower by 0.149 [",
        "At 8192 tokens",
        "catches 0.6 ",
        "random one 0.2: ",
        "the tree's is 0.9836 of the flat choice's, where 0.98 was asked",
    ):
        assert words in text, text
    assert "Asked, and not shown" not in text


def test_the_answer_begins_with_what_was_asked_and_is_not_shown() -> None:
    higher = [
        replace(row, value=float(row.value or 0) + 0.4)
        if (row.arm, row.metric) == ("hierarchical", "trailing_loss")
        else row
        for row in records()
    ]
    text = Prose.of(answer(higher))
    assert text.startswith(
        "Asked, and not shown: to beat a window of as many keys at equal tokens (a tree of means); to beat it at equal "
        "CPU time (a tree of means); to lose at most 0.01 to dense attention at equal tokens (a tree of means); to be "
        "0.05 below it at equal CPU time (a tree of means)."
    ), text
    assert "higher by 0.206 [" in text
    alone = [row for row in records() if row.seed == 0]
    assert "to beat a window of as many keys at equal tokens (a tree of means)" in Prose.of(answer(alone))
    assert "not told apart (-0.195 (n=1, no interval))" in Prose.of(answer(alone))


def test_arms_that_end_above_the_bigram_are_named() -> None:
    rows = [*records(), *(kept("best_first", 2.7, seed, at="equal tokens") for seed in range(7))]
    for bigram, words in ((2.6, "best_first ends above"), (2.8, "No arm ends above")):
        assert words in Prose.of(answer([*rows, kept("bigram", bigram, 0, part="counts")]))


def test_the_picture_has_a_line_per_training_against_text_and_against_time() -> None:
    rows = [kept("bigram", 2.6, 0)]
    for arm in FURTHER:
        rows += [look(arm, 3.0 - steps / 100, 0, steps) for steps in (64, 128)]
        rows.append(kept(arm, 2.0, 0, "cpu_seconds", part="step", phase="step"))
    # a look of one seed alone would bend the line of both
    rows += [look("dense", 3.0 - steps / 100, 1, steps) for steps in (64, 128, 150)]
    picture = learning(summary(rows))
    left, right = picture.axes
    assert [line.get_label() for line in left.lines] == [*FURTHER, "bigram"]
    assert list(left.lines[0].get_xdata()) == [64 * 8192 / 1e6, 128 * 8192 / 1e6]
    assert list(right.lines[0].get_xdata()) == [128.0, 256.0]
    assert left.get_ylim() == right.get_ylim()
    assert twins.of_picture(picture, "learning")


def test_without_records_there_is_neither_answer_nor_picture() -> None:
    with pytest.raises(NoEvidence):
        answer([kept("dense", 2.0, 0, at="equal tokens")])
    with pytest.raises(NoEvidence):
        learning(summary([kept("dense", 2.0, 0, at="equal tokens")]))
