import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from reports.build import build
from reports.training import training_page


def log(folder: Path, last: float = 1.9, *, torn: bool = False) -> Path:
    step = {"losses": {"main": 7.0, "total": 7.1}, "grad_norm": 1.0, "lr": 0.003, "max_vio": [0.5, 0.7]}
    lines: list[dict[str, Any]] = [
        {"kind": "run", "seed": 3, "corpus": "c0ffee", "baselines": {"unigram": 2.9, "bigram": 2.0, "lzma": 2.4}},
        *({"kind": "step", "step": at, **step} for at in range(1, 21)),
        {"kind": "validation", "step": 10, "bits_per_byte": 2.5, "by_domain": {"prose": 2.6, "code": 2.4}},
        {"kind": "validation", "step": 20, "bits_per_byte": last, "by_domain": {"prose": 2.0, "code": 1.8}},
        {"kind": "test", "step": 20, "bits_per_byte": 1.95, "by_domain": {"prose": 2.0, "code": 1.9}},
    ]
    path = folder / "train" / "log.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + ('{"kind": "st' if torn else ""))
    return path


def test_the_answer_says_what_held_out_text_costs_and_when_the_bigram_was_beaten(tmp_path: Path) -> None:
    page, _ = training_page(log(tmp_path, torn=True))
    assert page is not None
    (said,) = page.answers
    assert said.startswith("After 20 steps held-out text costs 1.9 bits per byte (1.95 on the test split)")
    assert said.endswith("below the bigram's 2 from step 20 on.")
    assert page.tables[0].rows[0] == ("model, validation", "1.9", "2", "1.8")
    assert [row[0] for row in page.tables[1].rows] == ["1", "11", "20"]


def test_a_model_that_does_not_beat_the_bigram_is_said_not_to(tmp_path: Path) -> None:
    page, left_out = training_page(log(tmp_path, last=2.1))
    assert left_out == ""
    assert page is not None
    assert "not below a bigram's 2." in page.answers[0]


@pytest.mark.parametrize("lines", ["", '{"kind": "run", "seed": 0, "corpus": "c", "baselines": {"bigram": 2.0}}\n'])
def test_a_run_without_an_evaluation_has_no_page(tmp_path: Path, lines: str) -> None:
    (tmp_path / "log.jsonl").write_text(lines)
    assert training_page(tmp_path / "log.jsonl") == (None, "")
    assert training_page(tmp_path / "none.jsonl") == (None, "")


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"3", "no object with a kind"),
        (b'{"a": 1}', "no object with a kind"),
        (b'{"kind": ["step"]}', "no object with a kind"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b'{"kind": "st', "Unterminated string"),
        (b"[" * 9999, "recursion"),
        (b'{"kind": "run", "seed": 0}', "lacks a part of a run"),
        (b'{"kind": "step", "step": 21, "losses": {"main": "7"}, "grad_norm": 1, "lr": 1, "max_vio": []}', "of a step"),
        (
            b'{"kind": "step", "step": 21, "losses": {"m": 7}, "grad_norm": 1, "lr": 1, "max_vio": [1]}',
            "number of layers",
        ),
        (b'{"kind": "validation", "step": 21, "by_domain": {"code": 1.0}}', "lacks a part of a validation"),
        (b'{"kind": "test", "step": 1, "bits_per_byte": 1' + b"0" * 400 + b', "by_domain": {}}', "no number"),
    ],
)
def test_a_bad_line_is_named_and_counted_and_the_page_stands_on_the_rest(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = log(tmp_path)
    whole = build(tmp_path, [])
    path.write_bytes(path.read_bytes() + line + b"\n")
    report = build(tmp_path, [])
    (said,) = report.left_out
    assert said.startswith("train/log.jsonl: 1 of 25 lines are none of a training log and were left out: line 25 (")
    assert reason in said
    assert report.pages == whole.pages


def test_lines_of_another_kind_and_of_other_losses_are_no_fault(tmp_path: Path) -> None:
    path = log(tmp_path)
    step = {
        "kind": "step",
        "step": 21,
        "losses": {"main": 7.0},
        "grad_norm": math.nan,
        "lr": 0.1,
        "max_vio": [0.5, 0.7],
    }
    with path.open("a") as file:
        file.write(json.dumps(step) + '\n{"kind": "note"}\n')
    page, left_out = training_page(path)
    assert left_out == ""
    assert page is not None
    assert page.tables[1].rows[-1] == ("21", "7", "nan", "0.1")


def test_of_many_bad_lines_the_first_are_named(tmp_path: Path) -> None:
    path = log(tmp_path)
    path.write_text(path.read_text() + "torn\n" * 9)
    assert training_page(path)[1].endswith("; and 4 more.")


def test_a_report_shows_the_run_that_lies_beside_its_records(tmp_path: Path) -> None:
    log(tmp_path)
    report = build(tmp_path, [])
    assert [page.name for page in report.pages] == ["training"]
    assert "figures/training-curve.svg" in report.files
    text = report.files["index.html"].decode()
    assert '">1.9</a> bits per byte' in text
    assert re.findall(r'<li id="ref-\d">(.*?)</li>', text) == [f"train/log.jsonl, line {at}" for at in (23, 24, 1)]
