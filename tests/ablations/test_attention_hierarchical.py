"""The study of attention down a tree: its cells, its counts, and what it makes of records."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from ablations import attention_hierarchical as hierarchical
from ablations import attention_hierarchical_pictures as pictures
from ablations.evidence import NoEvidence
from ablations.study import Cell
from bench import block_attention
from bench.block_attention import union_bytes
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.meters import ceiling
from bench.record import Record
from dsv3.config.counts import scored_in_all
from reports import twins

WHERE = provenance("full")
TIMED: dict[str, str | int] = {"part": "time", "dtype": "fp32", "threads": 1}


def kept(arm: str, metric: str, value: float, seed: int, **axes: str | int) -> Record:
    study = hierarchical.STUDY
    point = Point(study=study.name, arm=arm, baseline=study.baseline, seed=seed, axes={"device": "cpu"} | axes)
    return record(point, WHERE, Measurement(metric=metric, value=value))


def timed(length: int, tree: float, dense: float) -> list[Record]:
    rows = []
    for seed in range(6):
        for phase in hierarchical.PHASES:
            for arm, ratio in (("hierarchical", tree), ("dense", dense)):
                rows.append(kept(arm, f"{phase}_cpu_ratio", ratio, seed, length=length, **TIMED))
        rows.append(kept("hierarchical", "selection_cpu_share", 0.1, seed, length=length, **TIMED))
    return rows


def test_a_process_per_length_format_and_seed_and_fewer_blocks_of_long_calls() -> None:
    full = hierarchical.cells("full")
    assert len(full) == 6 * 4 * 2 + 2
    assert [hierarchical.blocks(length) for length in (4096, 16384, 65536, 131072)] == [7, 4, 1, 1]
    assert {cell.axes["part"] for cell in hierarchical.cells("quick")} == {"time", "counts"}


def test_a_process_says_what_share_of_a_product_s_speed_every_arm_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ceilings = [], {torch.float32: 1e9, torch.bfloat16: 2e9}

    def rate(device: torch.device, form: torch.dtype, which: str) -> Measurement:
        asked.append((device.type, form, which))
        return Measurement(metric="gemm_flops_per_second", value=ceilings[form])

    monkeypatch.setattr(ceiling, "gemm_rate", rate)
    monkeypatch.setattr(hierarchical, "blocks", lambda length: 1)
    monkeypatch.setattr(block_attention, "check", lambda *_: None)
    axes: dict[str, str | int] = {"part": "time", "dtype": "bf16", "length": 128, "threads": 1}
    found = hierarchical.measure(Cell(arm=None, seed=1, axes=axes, seconds=1.0))
    assert set(asked) == {("cpu", form, "cpu") for form in ceilings}
    value = {
        (row.arm, row.axes["phase"], row.measurement.metric): row.measurement.value
        for row in found
        if row.measurement and "phase" in row.axes
    }
    pairs, products = 4 * 64 * 2 * 128 * 129 // 2, {"forward": 2, "forward_backward": 7}
    for arm, form in (("sdpa", torch.bfloat16), ("sdpa_fp32", torch.float32), ("plain", torch.bfloat16)):
        for phase in hierarchical.PHASES:
            share = value[arm, phase, "ceiling_share"]
            assert share == pytest.approx(products[phase] * pairs / value[arm, phase, "cpu_seconds"] / ceilings[form])


def test_on_a_gpu_nothing_is_passed_off_as_its_time() -> None:
    for cell in hierarchical.cells("full"):
        if cell.axes["part"] != "counts":
            (reading,) = hierarchical.measure(replace(cell, device="cuda"))
            assert "attention_gpu" in str(reading.pending)


def test_a_flat_search_scores_per_token_what_grows_as_n_and_a_tree_what_grows_as_log_n() -> None:
    found = {
        (row.arm, row.axes["queries per choice"], row.axes["length"]): row.measurement.value
        for row in hierarchical.counts()
        if row.measurement is not None
    }
    for size in (1, 64):
        flat = [found["blocks", size, length] / length for length in hierarchical.COUNTED[-2:]]
        tree = [found["hierarchical", size, length] / length for length in hierarchical.COUNTED[-5::2]]
        assert flat[1] / flat[0] == pytest.approx(2, rel=0.01)
        # each fourfold length adds a level of the tree, and so the same number of scores
        assert tree[2] - tree[1] == pytest.approx(tree[1] - tree[0], rel=0.05)
    # 1M tokens in blocks of 64: 16384 blocks, of which the average query has half before it, all but two scored
    assert found["blocks", 1, 2**20] / 2**20 == pytest.approx(16384 / 2 - 2, rel=0.01)


def test_a_search_by_bounds_scores_at_least_what_its_beam_does_and_at_most_the_tree_besides() -> None:
    found = {(row.axes["length"], row.axes["queries per choice"]): row.measurement for row in hierarchical.opened()}
    assert found.keys() == {(length, size) for length in hierarchical.OPENED for size in (64, 1)}
    for (length, size), measured in found.items():
        assert measured is not None
        beam = sum(scored_in_all(hierarchical.CHOICES["hierarchical"](size), 0, length))
        # nodes of all levels that end before a query, at most 1 + 1/4 + 1/16 + ... of its blocks
        tree = 4 / 3 * sum(position // 64 for position in range(0, length, size))
        assert beam < measured.value <= beam + tree


def test_a_choice_for_each_token_or_head_reads_more_together_than_one_for_all() -> None:
    tree = hierarchical.CHOICES["hierarchical"]
    length, token = 2048, 2 * 64 * 4
    # a block of 64 queries sees 16 blocks of 64 keys, the first ones all before them
    alone = union_bytes(tree(64), length, 1)
    assert alone == token * 64 * (sum(range(1, 16)) + 16 * 17)
    dense = union_bytes(None, length, 1)
    assert dense == token * 64 * sum(range(1, 33))
    for more in (union_bytes(tree(64), length, 4), union_bytes(tree(1), length, 1)):
        assert alone < more <= dense


def test_the_answer_names_the_longest_length_and_splits_the_ratio() -> None:
    said = hierarchical.answer(timed(4096, 0.5, 0.6) + timed(16384, 0.1, 0.4))
    assert "At 16384 tokens" in said
    assert "10 times as fast as SDPA: the kernel's dense form 2.5 times, and the choice 4 times" in said
    assert "grows as n" not in said, "nothing was timed in seconds"
    assert "a window" not in said
    assert "peak bytes" not in said
    with pytest.raises(NoEvidence):
        hierarchical.answer([])


def test_the_answer_names_those_that_choose_otherwise_and_the_memory() -> None:
    rows = timed(4096, 0.5, 0.6)
    for seed in range(6):
        for arm, ratio in (("window", 0.25), ("blocks", 0.8)):
            rows.append(kept(arm, "forward_cpu_ratio", ratio, seed, length=4096, **TIMED))
    for arm, taken in (("hierarchical", 300), ("sdpa", 400)):
        rows.append(kept(arm, "peak_bytes", taken, 0, phase="forward_backward", length=4096, **TIMED))
    for arm, scored in (("best_first", 90), ("blocks", 60)):
        rows.append(kept(arm, "selection_scores", scored, 0, length=4096, **{"queries per choice": 1}))
    said = hierarchical.answer(rows)
    assert "a window of as many keys is 4 times as fast as SDPA, the flat choice 1.25 times." in said
    assert "At 4096 tokens, each choosing for itself, a search by bounds takes 1.5 times the scores of the flat" in said
    assert "choice on random inputs" in said
    assert "At 4096 tokens forward and backward take 0.75 of SDPA's peak bytes beyond the inputs." in said


def test_the_answer_says_with_which_power_of_the_length_time_grows() -> None:
    rows = timed(4096, 0.5, 0.6) + timed(16384, 0.1, 0.4)
    for seed in range(6):
        for arm, power in (("hierarchical", 1.1), ("sdpa", 2.0)):
            for length in (4096, 16384):
                seconds = (1 + 0.01 * seed) * length**power
                rows.append(kept(arm, "cpu_seconds", seconds, seed, phase="forward", length=length, **TIMED))
    said = hierarchical.answer(rows)
    assert "From 4096 tokens on its time grows as n to the 1.1 [1.1, 1.1], that of SDPA to the 2 [2, 2]." in said


def test_pictures_show_scores_per_token_and_the_slope_of_time() -> None:
    counted = [
        {"metric": "selection_scores", "arm": row.arm, "value": row.measurement.value, **row.axes}
        for row in hierarchical.counts()
        if row.measurement is not None
    ]
    lines = pictures.scores(pd.DataFrame(counted)).axes[0].lines
    assert len(lines) == 4
    seconds = [
        {"metric": "cpu_seconds", "phase": "forward", "arm": arm, "length": n, "value": 1e-9 * n**power, **TIMED}
        for arm, power in (("sdpa", 2.0), ("hierarchical", 1.0))
        for n in (4096, 16384, 65536)
    ]
    picture = pictures.growth(pd.DataFrame(seconds))
    labels = [line.get_label() for line in picture.axes[0].lines]
    assert labels == ["sdpa: n^2.00", "hierarchical: n^1.00", "n log n"]
    ideal = picture.axes[0].lines[2].get_ydata()
    assert ideal[-1] / ideal[0] == pytest.approx(16 * math.log(65536) / math.log(4096))
    assert twins.of_picture(picture, "growth")
    with pytest.raises(NoEvidence):
        pictures.growth(pd.DataFrame(seconds).query("length == 4096"))
