"""The study of language models: what its arms share, what a cell measures, and what it makes of records."""

from statistics import fmean
from typing import Any

import pytest

from ablations import STUDIES
from ablations.attention_language import (
    KEYS,
    SECONDS,
    SELECTS,
    STUDY,
    TRAINED,
    answer,
    configured,
    learning,
    measure,
)
from ablations.catalogue import load
from ablations.cell import to_record
from ablations.code import ROOT
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


def records() -> list[Record]:
    rows = []
    for seed in range(7):
        noise = 0.001 * (seed % 3)
        for arm, time, tokens in (("dense", 2.0, 2.0), ("window", 2.1, 2.2), ("hierarchical", 1.9, 2.005)):
            rows.append(kept(arm, time + noise * (arm == "hierarchical"), seed, at="equal time"))
            rows.append(kept(arm, tokens + noise * (arm == "hierarchical"), seed, at="equal tokens"))
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
    assert {cell.arm for cell in cells if cell.axes["part"] == "training"} == set(TRAINED)
    assert {cell.axes.get("seconds_of_training", SECONDS["full"]) for cell in cells} == {600}, "ten minutes each"


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


def test_a_training_is_looked_at_at_equal_time_and_equal_tokens_and_its_attention_is_weighed() -> None:
    axes = {"part": "training", "length": 256, "seconds_of_training": 1}
    cell = Cell(arm="dense", seed=0, axes=axes, seconds=1.0)
    rows = [to_record(STUDY, cell, reading, provenance("quick"), None) for reading in measure(cell)]
    assert {row.axes["at"] for row in rows if row.metric == "trailing_loss"} == {"a look", "equal time", "equal tokens"}
    masses = [row for row in rows if row.metric == "attention_mass"]
    assert {row.axes["tokens"] for row in masses} == {64, 128, 256}
    assert {row.arm for row in masses} == {"blocks", "hierarchical", "best_first", "random", "oracle", "forced"}
    assert 0.0 < fmean(float(row.value or 0) for row in masses) < 1.0


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


def test_a_training_that_has_not_read_as_much_as_the_others_has_no_loss_at_equal_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench import language_training

    whole = language_training.learn

    def cut_short(*given: Any, **limits: Any) -> Any:
        return whole(*given, **limits | {"seconds": 1e-9})

    monkeypatch.setattr(language_training, "learn", cut_short)
    axes = {"part": "training", "length": 256, "seconds_of_training": 1}
    rows = measure(Cell(arm="window", seed=0, axes=axes, seconds=1.0))
    (late,) = [row for row in rows if row.axes["at"] == "equal tokens"]
    assert late.pending == "only 1 of 8 steps fitted into 1 seconds here"


def test_without_the_kernel_nothing_is_trained_or_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsv3.attention

    monkeypatch.setattr(dsv3.attention, "why_not_kernel", lambda q: "there is no C++ compiler")
    for arm, part in (("hierarchical", "training"), (None, "step")):
        axes: dict[str, Any] = {"part": part, "length": 256, "seconds_of_training": 1}
        (row,) = measure(Cell(arm=arm, seed=0, axes=axes, seconds=1.0))
        assert row.pending == "there is no C++ compiler"


def test_a_training_that_diverges_is_a_failed_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import language_training

    def diverge(*_: object, **__: object) -> None:
        raise FloatingPointError("step 3: gradient that is not finite")

    monkeypatch.setattr(language_training, "learn", diverge)
    axes = {"part": "training", "length": 256, "seconds_of_training": 1}
    (reading,) = measure(Cell(arm="window", seed=0, axes=axes, seconds=1.0))
    assert (reading.metric, reading.failed) == ("trailing_loss", "step 3: gradient that is not finite")


def test_the_answer_names_both_gaps_and_what_the_tree_catches_at_the_longest_text() -> None:
    text = Prose.of(answer(records()))
    for words in (
        "by -0.0991 [",
        "by 0.00586 [",
        "keys by -0.194 [",
        "At 8192 tokens",
        "catches 0.6 ",
        "random one 0.2.",
    ):
        assert words in text, text


def test_the_picture_has_a_line_per_training_against_text_and_against_time() -> None:
    rows = [kept("bigram", 2.6, 0)]
    for arm in TRAINED:
        for steps in (64, 128):
            rows.append(kept(arm, 3.0 - steps / 100, 0, at="a look", steps=steps))
            rows.append(kept(arm, 2.0 * steps, 0, "cpu_seconds", at="a look", steps=steps))
    # a last look of one seed alone would bend the line of both
    for seed, steps in ((1, 64), (1, 128), (1, 150)):
        rows.append(kept("dense", 3.0 - steps / 100, seed, at="a look", steps=steps))
        rows.append(kept("dense", 2.0 * steps, seed, "cpu_seconds", at="a look", steps=steps))
    picture = learning(summary(rows))
    left, right = picture.axes
    assert [line.get_label() for line in left.lines] == [*TRAINED, "bigram"]
    assert list(left.lines[0].get_xdata()) == [64 * 8192 / 1e6, 128 * 8192 / 1e6]
    assert list(right.lines[0].get_xdata()) == [128.0, 256.0]
    assert left.get_ylim() == right.get_ylim()
    assert twins.of_picture(picture, "learning")


def test_without_records_there_is_neither_answer_nor_picture() -> None:
    with pytest.raises(NoEvidence):
        answer([kept("dense", 2.0, 0, at="equal time")])
    with pytest.raises(NoEvidence):
        learning(summary([kept("dense", 2.0, 0, at="equal time")]))
