"""The tables that set every arm against its baseline say what was changed and what came of it, and lead to records."""

from dataclasses import replace

import pytest

from ablations.catalogue import load
from ablations.comparison import Compared
from ablations.study import Arm, Study
from ablations.traced import Prose
from bench.record import Record
from dsv3.config import presets, vary
from reports.baseline import against_baseline

TINY = presets.tiny()
BITS = Compared("bits_per_byte", margin=0.01, why="a hundredth of a bit", where={"look": "training"})


@pytest.fixture
def study() -> Study:
    return replace(
        load("multi_token"),
        rules=(),
        configs={},
        compared=(BITS,),
        arms=(
            Arm("none", "", vary(TINY, **{"model.mtp": None})),
            Arm("one", "a module", TINY),
            Arm("words", "no config"),
        ),
    )


def row(study: Study, arm: str, seed: int, value: float, look: str = "training") -> Record:
    known = {"study": study.name, "metric": "bits_per_byte", "unit": "bit/byte", "noise": "absolute", "n": 1}
    where = {"machine": "m", "revision": "r", "profile": "full", "time": "t", "axes": {"look": look}}
    return Record(**known, **where, arm=arm, seed=seed, value=value)  # type: ignore[arg-type]


def test_what_an_arm_changes_stands_before_any_record(study: Study) -> None:
    (table,) = against_baseline(study, ())
    assert table.caption == "What each arm changes against none"
    assert table.rows[0][:2] == ("one", "model.mtp: None -> MTP()")
    assert "FLOPs per token 1.43x" in table.rows[0][2]
    assert table.rows[1] == ("words", "no config: no config", "-")


def test_a_study_without_configs_and_comparisons_has_no_such_table() -> None:
    assert against_baseline(load("pipeline_bubble"), ()) == []


def test_a_comparison_shows_its_numbers_and_leads_to_the_records_that_were_paired(study: Study) -> None:
    gaps = (0.021, 0.019, 0.024, 0.016, 0.022, 0.018)
    records = [row(study, "none", seed, 2.0 + seed) for seed in range(6)]
    records += [row(study, "one", seed, 2.0 + seed + gap) for seed, gap in enumerate(gaps)]
    records += [row(study, "one", 0, 9.0, look="elsewhere")]
    table = against_baseline(study, records)[1]
    assert table.caption == "bits per byte (bit/byte) minus none's, by seed (look training)"
    assert "beyond +-0.01 (a hundredth of a bit)" in table.note
    assert table.rows[0] == (
        "one",
        "0.02 [0.017, 0.023] (n=6)",
        "[0.016, 0.024]",
        "0.031",
        "0.031",
        "1",
        "0.00416",
        "different",
    )
    difference = table.rows[0][1]
    assert isinstance(difference, Prose)
    assert difference.references[0].sources == {record.id for record in records[:12]}


def test_records_of_an_older_rule_are_not_tested(study: Study) -> None:
    records = [replace(row(study, arm, seed, 2.0), rule="0" * 12) for arm in ("none", "one") for seed in range(6)]
    assert len(against_baseline(study, records)) == 1
