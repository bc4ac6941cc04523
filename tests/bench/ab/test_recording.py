"""Blocks survive a kill, are never mixed with others, and give ratios that units and drift leave alone."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.ab import recording
from bench.ab.block import Block
from bench.ab.recording import Comparison, append, content, load, ratio, ratios, trees, unable
from bench.ab.turns import ARMS, SLOWED
from bench.revision import ROOT

OURS = Comparison(base="b" * 40, head="h" * 64, machine="m", cases=("decode", "step"))
SECONDS = {arm: [0.001, 0.0012, 0.0011, 0.001] for arm in (*ARMS, *SLOWED)}
BLOCK = Block(seconds={"decode": SECONDS}, unable={"step": "base: ImportError: no"}, took=1.5, load=0.5)

KEEPS_APPENDING = """
import sys
from pathlib import Path
from bench.ab import recording
from bench.ab.block import Block
from bench.ab.recording import Comparison, append
from bench.ab.turns import ARMS, SLOWED
ours = Comparison(base="b" * 40, head="h" * 64, machine="m", cases=("decode", "step"))
seconds = {arm: [0.001] * 12 for arm in (*ARMS, *SLOWED)}
for number in range(100_000):
    append(Path(sys.argv[1]), ours, Block(seconds={"decode": seconds}, unable={"step": "no"}, took=number, load=0.5))
"""


def write(out: Path, line: dict[str, Any] | str) -> None:
    with OURS.path(out).open("a") as file:
        file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")


def test_a_block_is_read_back_as_it_was(tmp_path: Path) -> None:
    append(tmp_path, OURS, BLOCK)
    append(tmp_path, OURS, replace(BLOCK, took=2.0))
    blocks, skipped = load(tmp_path, OURS)
    assert blocks == [BLOCK, replace(BLOCK, took=2.0)]
    assert skipped == []
    assert load(tmp_path / "nowhere", OURS) == ([], [])


def test_a_killed_run_loses_at_most_the_block_it_was_writing(tmp_path: Path) -> None:
    command = (sys.executable, "-c", KEEPS_APPENDING, str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT) as process:
        path = OURS.path(tmp_path)
        while not path.exists() or path.stat().st_size < 5000:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    blocks, skipped = load(tmp_path, OURS)
    assert [block.took for block in blocks] == list(range(len(blocks)))
    assert len(skipped) <= 1
    append(tmp_path, OURS, BLOCK)
    assert load(tmp_path, OURS)[0] == [*blocks, BLOCK], "the next run goes on behind what was torn"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"machine": "another"}, "machine='another': not of this comparison"),
        ({"cases": ["decode"]}, "cases=.*not of this comparison"),
        ({"head": "0" * 64}, "head=.*not of this comparison"),
        ({"schema": 1}, "schema=1: this dsv3 reads 2"),
        ({"unable": {}}, "must hold every case"),
        ({"seconds": {"decode": {**SECONDS, "head": [0.001, math.nan, 0.001, 0.001]}}}, "decode head: .*positive"),
        ({"seconds": {"decode": {**SECONDS, "+5%": [0.001]}}}, r"decode \+5%: .*as many as the base"),
        ({"seconds": {"decode": {}}}, "KeyError"),
    ],
)
def test_a_line_that_is_not_of_this_comparison_is_named_and_left_out(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    append(tmp_path, OURS, BLOCK)
    write(tmp_path, json.loads(OURS.path(tmp_path).read_text()) | change)
    append(tmp_path, OURS, BLOCK)
    blocks, skipped = load(tmp_path, OURS)
    assert blocks == [BLOCK, BLOCK]
    assert [line.line for line in skipped] == [2]
    assert re.search(reason, skipped[0].reason)


@pytest.mark.parametrize("line", ["no JSON", "[]", "null", '{"schema": 2}', '{"schema": 2, "base": "b'])
def test_a_corrupt_line_is_named_and_left_out(tmp_path: Path, line: str) -> None:
    append(tmp_path, OURS, BLOCK)
    write(tmp_path, line)
    blocks, skipped = load(tmp_path, OURS)
    assert blocks == [BLOCK]
    assert [at.line for at in skipped] == [2]


@given(st.lists(st.floats(1e-4, 1e-1), min_size=12, max_size=12), st.floats(1e-3, 1e9), st.floats(0.5, 2.0))
def test_a_ratio_has_no_unit(base: list[float], unit: float, slower: float) -> None:
    head = [taken * slower for taken in base]
    here = {"base": base, "head": head}
    there = {arm: [taken * unit for taken in seconds] for arm, seconds in here.items()}
    assert ratio(here, "head") == pytest.approx(slower)
    assert ratio(there, "head") == pytest.approx(ratio(here, "head"))


def test_a_ratio_compares_turns_beside_each_other() -> None:
    drift = [1.0, 2.0, 4.0]
    arms = {"base": drift, "head": [1.1 * taken for taken in drift]}
    assert ratio(arms, "head") == pytest.approx(1.1)
    spiked = {**arms, "head": [*arms["head"][:2], 99.0]}
    assert ratio(spiked, "head") == pytest.approx(1.1), "one bad turn of three does not move a median"


def test_a_case_that_failed_in_any_block_is_not_comparable() -> None:
    whole = replace(BLOCK, seconds={"decode": SECONDS, "step": SECONDS}, unable={})
    assert set(ratios([whole], "head")) == {"decode", "step"}
    assert set(ratios([whole, BLOCK], "head")) == {"decode"}
    assert unable([whole, BLOCK]) == {"step": "base: ImportError: no"}
    assert ratios([], "head") == {}


def test_both_sides_have_the_same_bench_and_folders_of_equal_length() -> None:
    with trees("HEAD") as made:
        assert made["control"] == made["base"]
        assert len(str(made["base"])) == len(str(made["head"]))
        assert (made["head"] / "bench/ab/block.py").read_text() == (made["base"] / "bench/ab/block.py").read_text()
        before = content(made["head"])
        (made["head"] / "dsv3" / "__pycache__").mkdir(exist_ok=True)
        (made["head"] / "dsv3" / "__pycache__" / "x.pyc").write_text("compiled")
        assert content(made["head"]) == before
        (made["head"] / "dsv3" / "__init__.py").write_text("changed")
        assert content(made["head"]) != before
    assert not any(folder.exists() for folder in made.values())


def test_a_revision_without_dsv3_is_refused_lest_todays_run_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "checked_out", lambda revision: nullcontext(tmp_path))
    with pytest.raises(ValueError, match=r"revision='old': must hold dsv3"), trees("old"):
        pytest.fail("entered")
