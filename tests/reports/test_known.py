"""Which studies a report has pages of: the list's, others by path, and this repository's that have records there."""

from pathlib import Path

from ablations import STUDIES
from ablations.code import ROOT
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record, append
from reports.known import recorded

WHERE = provenance("full")


def kept(study: str) -> Record:
    point = Point(study=study, arm="dense", baseline="dense", seed=0, axes={"device": "cpu"})
    return record(point, WHERE, Measurement(metric="accuracy", value=0.5))


def test_a_study_run_by_its_path_has_a_page_where_it_has_records(tmp_path: Path) -> None:
    assert [study.name for study in recorded(tmp_path)] == list(STUDIES)
    append(tmp_path / "records.jsonl", [kept("attention_quality"), kept("of_somebody_else"), kept(STUDIES[0])])
    assert [study.name for study in recorded(tmp_path)] == [*STUDIES, "attention_quality"]


def test_a_study_that_is_given_by_its_path_is_there_once(tmp_path: Path) -> None:
    append(tmp_path / "records.jsonl", [kept("attention_quality")])
    given = str(ROOT / "ablations" / "attention_quality.py")
    assert [study.name for study in recorded(tmp_path, (given,))] == [*STUDIES, "attention_quality"]
