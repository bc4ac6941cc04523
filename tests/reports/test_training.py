import json
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
    page = training_page(log(tmp_path, torn=True))
    assert page is not None
    (said,) = page.answers
    assert said.startswith("After 20 steps held-out text costs 1.9 bits per byte (1.95 on the test split)")
    assert said.endswith("below the bigram's 2 from step 20 on.")
    assert page.tables[0].rows[0] == ("model, validation", "1.9", "2", "1.8")
    assert [row[0] for row in page.tables[1].rows] == ["1", "11", "20"]


def test_a_model_that_does_not_beat_the_bigram_is_said_not_to(tmp_path: Path) -> None:
    page = training_page(log(tmp_path, last=2.1))
    assert page is not None
    assert "not below a bigram's 2." in page.answers[0]


@pytest.mark.parametrize("lines", ["", '{"kind": "run", "seed": 0, "corpus": "c", "baselines": {}}\n'])
def test_a_run_without_an_evaluation_has_no_page(tmp_path: Path, lines: str) -> None:
    (tmp_path / "log.jsonl").write_text(lines)
    assert training_page(tmp_path / "log.jsonl") is None
    assert training_page(tmp_path / "none.jsonl") is None


def test_a_report_shows_the_run_that_lies_beside_its_records(tmp_path: Path) -> None:
    log(tmp_path)
    report = build(tmp_path, [])
    assert [page.name for page in report.pages] == ["training"]
    assert "figures/training-curve.svg" in report.files
    text = report.files["index.html"].decode()
    assert '">1.9</a> bits per byte' in text
    assert re.findall(r'<li id="ref-\d">(.*?)</li>', text) == [f"train/log.jsonl, line {at}" for at in (23, 24, 1)]
