"""The study of choosing by itself: what its cells measure, and what it makes of records."""

from typing import Any

import pytest

from ablations import attention_choosing as choosing
from ablations.evidence import NoEvidence
from ablations.study import Cell
from ablations.traced import Prose
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from reports.frame import summary

WHERE = provenance("full")

LENGTHS = (4096, 16384, 65536)


def kept(arm: str, metric: str, value: float, seed: int, **axes: str | int) -> Record:
    point = Point(study=choosing.STUDY.name, arm=arm, baseline="sdpa", seed=seed, axes={"device": "cpu"} | axes)
    return record(point, WHERE, Measurement(metric=metric, value=value))


def records(crossing: float) -> list[Record]:
    """Six processes in which the tree is faster than the flat search from that length on; time is half the share."""
    rows = []
    for seed in range(6):
        for size in (1, 64):
            for length in LENGTHS:
                axes = {
                    "part": "choosing",
                    "to": 65536,
                    "phase": "choosing",
                    "length": length,
                    "queries per choice": size,
                }
                rows.append(kept("blocks", "cpu_seconds", (1 + seed) * length / crossing, seed, **axes))
                rows.append(kept("hierarchical", "cpu_seconds", 1 + seed, seed, **axes))
        for number, share in ((4, 0.03), (128, 0.75), (256, 1.0)):
            where: dict[str, Any] = {"part": "sparsity", "length": 16384, "blocks seen": number}
            arm = "dense" if number == 256 else "hierarchical"
            rows.append(kept(arm, "forward_cpu_ratio", share / 2, seed, **where))
            rows.append(kept(arm, "selection_share", share, seed, **where))
    return rows


def test_the_answer_says_between_which_lengths_the_tree_begins_to_pay() -> None:
    said = Prose.of(choosing.answer(records(crossing=30000.0)))
    assert "faster than the flat search from between 16384 and 65536 tokens on (1.83" in said
    assert "and 0.458 [0.458, 0.458] of its time); choosing for each token, from between 16384" in said
    assert "At 16384 tokens attention to 4 blocks, 0.03 of the visible pairs, takes 0.015 of" in said
    assert "at no length that follows one at which it is slower" in choosing.answer(records(crossing=1e9))
    with pytest.raises(NoEvidence):
        choosing.answer([])


def test_one_short_cell_times_both_searches_for_blocks_and_for_single_queries() -> None:
    cell = Cell(arm=None, seed=1, axes={"part": "choosing", "to": 4096, "threads": 1}, seconds=5)
    rows = choosing.measure(cell)
    assert {(row.arm, row.axes["queries per choice"], row.axes["length"]) for row in rows} == {
        (arm, size, 4096) for arm in ("blocks", "hierarchical") for size in (1, 64)
    }
    assert all(row.measurement is not None and row.measurement.value > 0 for row in rows)


def test_fewer_blocks_are_timed_against_sdpa_and_the_dense_kernel() -> None:
    axes = {"part": "sparsity", "length": 1024, "threads": 1}
    rows = choosing.measure(Cell(arm=None, seed=0, axes=axes, seconds=5))
    assert {(row.arm, row.axes["blocks seen"]) for row in rows} == {
        ("hierarchical", 4),
        ("hierarchical", 8),
        ("dense", 16),
    }
    shares = [row.measurement.value for row in rows if row.measurement and row.measurement.metric == "selection_share"]
    # of 16 blocks: 4 seen by all but the first three, 8 by all but the first seven, each its own by half
    half, visible = 16 * 64 * 65 / 2, 1024 * 1025 / 2
    assert shares == [(half + 64**2 * (0 + 1 + 2 + 13 * 3)) / visible, (half + 64**2 * (21 + 9 * 7)) / visible, 1.0]


def test_pictures_show_a_line_per_search_and_points_per_number_of_blocks() -> None:
    table = summary(records(30000.0))
    labels = [line.get_label() for line in choosing.choices(table).axes[0].lines]
    assert labels == [
        f"{arm}, {words} a choice" for words in ("each token", "64 tokens") for arm in ("blocks", "hierarchical")
    ]
    axes = choosing.relative(table).axes[0]
    assert [text.get_text() for text in axes.texts] == ["4", "128"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.015, 0.375])
    with pytest.raises(NoEvidence):
        choosing.relative(table[table["part"] == "choosing"])
