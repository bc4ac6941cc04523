"""The factorial study measures every arm and its effects reach the page; its design is that of moe_capacity's model."""

from dataclasses import replace

import pytest

from ablations import STUDIES
from ablations.catalogue import load
from ablations.cell import to_record
from ablations.code import ROOT
from ablations.moe_capacity import CONFIGS as ALONE
from ablations.study import Study
from bench.fingerprint import Provenance
from bench.record import Record
from reports.baseline import against_baseline
from reports.pages import study_page


@pytest.fixture(scope="module")
def study() -> Study:
    return load(str(ROOT / "ablations" / "moe_factorial.py"))


@pytest.fixture(scope="module")
def records(study: Study) -> list[Record]:
    """One seed of every arm, a step of 256 tokens."""
    small = [replace(cell, axes={"steps": 1, "tokens": 256}) for cell in study.cells("quick") if cell.seed == 0]
    where = Provenance(machine="m", revision="abc123", profile="quick")
    return [to_record(study, cell, reading, where, None) for cell in small for reading in study.measure(cell)]


def test_each_factor_alone_is_an_arm_of_the_study_of_one_thing_at_a_time(study: Study) -> None:
    assert study.name not in STUDIES
    configs = {arm.name: arm.config for arm in study.arms}
    assert configs["base"] == ALONE["dropless"]
    assert configs["capacity=fixed"] == ALONE["factor_1.2"]
    assert configs["balance=sign_bias"] == ALONE["sign_bias"]
    assert len(configs) == len({str(config) for config in configs.values()}) == 4
    full = study.config("capacity=fixed,balance=sign_bias")
    assert full is not None
    assert (full.train.steps, full.train.batch_size * full.train.sequence_length) == (120, 2048)


def test_every_arm_has_a_loss_and_drops_where_it_has_a_capacity(study: Study, records: list[Record]) -> None:
    assert [record.error for record in records] == [None] * 6
    assert [record.arm for record in records if record.metric == "loss"] == [arm.name for arm in study.arms]
    dropped = {record.arm: record.value or 0.0 for record in records if record.metric == "drop_share"}
    assert list(dropped) == ["capacity=fixed", "capacity=fixed,balance=sign_bias"]
    assert all(0 < share < 1 for share in dropped.values())
    losses = {record.value for record in records if record.metric == "loss"}
    assert len(losses) > 1, "a capacity changes what is learnt"


def test_the_page_answers_by_the_effects_and_shows_them(study: Study, records: list[Record]) -> None:
    *_, table = against_baseline(study, records)
    assert [row[0] for row in table.rows] == ["capacity", "balance", "capacity x balance"]
    assert {row[-1] for row in table.rows} == {"needs the full profile (1 of 6 seeds)"}
    loss = {record.arm: float(record.value or 0) for record in records if record.metric == "loss"}
    capacity = loss["capacity=fixed"] + loss["capacity=fixed,balance=sign_bias"] - loss["base"]
    capacity = (capacity - loss["balance=sign_bias"]) / 2
    assert float(table.rows[0][1]) == pytest.approx(capacity, rel=0.01)
    (answer,) = study_page(study, records, {}).answers
    assert answer.startswith("After 1 steps a capacity changes the held-out loss by")
