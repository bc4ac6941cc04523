"""The study of pipeline bubbles: what it measures, the verdict it gives, and that it shows only what was measured."""

from collections.abc import Sequence

import pytest

from ablations import pipeline_bubble
from ablations.claims import Outcome, ledger
from ablations.evidence import NoEvidence
from ablations.pipeline_bubble import RANKS, STUDY, answer, fewest, one_f_one_b_reaches, sweep
from ablations.study import Reading
from bench.fingerprint import provenance
from bench.measurement import Point, record
from bench.record import Record
from dsv3.pipeline import SCHEDULES, Schedule, named
from reports.frame import summary


@pytest.fixture(scope="module")
def readings() -> list[tuple[int, Reading]]:
    return [(int(cell.axes["ranks"]), r) for cell in STUDY.cells("quick") for r in STUDY.measure(cell)]


@pytest.fixture(scope="module")
def records(readings: Sequence[tuple[int, Reading]]) -> list[Record]:
    where = provenance("quick")
    rows = []
    for ranks, reading in readings:
        assert reading.measurement is not None, reading
        point = Point(study=STUDY.name, arm=reading.arm, axes={"ranks": ranks, **reading.axes})
        rows.append(record(point, where, reading.measurement))
    return rows


def test_both_profiles_ask_the_same_of_every_schedule(readings: Sequence[tuple[int, Reading]]) -> None:
    assert STUDY.cells("quick") == STUDY.cells("full")
    assert {(ranks, reading.arm) for ranks, reading in readings} == {(p, s.name) for p in RANKS for s in SCHEDULES}
    used = {reading.measurement.metric for _, reading in readings if reading.measurement is not None}
    assert used == set(STUDY.metrics)


def test_a_schedule_is_left_out_only_where_it_is_not_defined(readings: Sequence[tuple[int, Reading]]) -> None:
    there = {(ranks, reading.arm, reading.axes["microbatches"]) for ranks, reading in readings}
    for ranks in RANKS:
        for schedule in SCHEDULES:
            for microbatches in set(sweep(ranks)) - {m for p, arm, m in there if (p, arm) == (ranks, schedule.name)}:
                with pytest.raises(ValueError, match="must be"):
                    schedule.plan(ranks, microbatches)


@pytest.mark.parametrize("ranks", RANKS)
def test_the_fewest_microbatches_reach_12_percent_and_one_less_does_not(ranks: int) -> None:
    of_time, of_work = fewest(ranks)
    assert {of_time, of_work} <= set(sweep(ranks))
    assert (ranks - 1) / (of_time + ranks - 1) <= 0.12 < (ranks - 1) / (of_time - 1 + ranks - 1)
    assert (ranks - 1) / of_work <= 0.12 < (ranks - 1) / (of_work - 1)


def test_1f1b_misses_12_percent_at_the_fewest_usual_microbatches(records: list[Record]) -> None:
    verdict = one_f_one_b_reaches(ledger()["E2"], records)
    assert verdict.outcome is Outcome.FAILS
    assert (verdict.low, verdict.high) == pytest.approx((3 / 19, 15 / 79))
    assert "12% takes at least 22 / 52 / 110 microbatches there (25 / 59 / 125 if" in verdict.answer
    assert "would idle 11.1%" in verdict.answer


def test_the_answer_has_the_numbers_of_the_records(records: list[Record]) -> None:
    said = answer(records)
    assert "one_f_one_b 19.0%, interleaved_one_f_one_b 10.5%, zero_bubble_h1 7.2%, dual_pipe 6.8%" in said
    assert "holds 16 microbatches under 1F1B and 17 under DualPipe" in said
    with pytest.raises(NoEvidence):
        answer(records[:1])


def test_a_picture_needs_records_and_must_agree_with_them(records: list[Record]) -> None:
    drawn = next(figure.draw for figure in STUDY.figures if figure.name == "gantt")
    assert drawn is not None
    picture = drawn(summary(records))
    assert [axes.get_title(loc="left").split(":")[0] for axes in picture.axes][:2] == ["GPipe", "1F1B"]
    with pytest.raises(NoEvidence, match="no record of dual_pipe on 4 ranks with 8 microbatches"):
        drawn(summary([row for row in records if row.arm != "dual_pipe"]))
    table = summary(records)
    table.loc[table["metric"] == "bubble_share", "value"] = 0.5
    with pytest.raises(AssertionError, match=r"the records say 0\.5"):
        drawn(table)


def test_a_plan_that_misses_its_closed_form_is_a_failed_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = named("gpipe")
    off = Schedule(name="gpipe", plan=plain.plan, idle=lambda p, m, t: 0.5, peak=plain.peak, about=plain.about)
    monkeypatch.setattr(pipeline_bubble, "SCHEDULES", (off,))
    found = STUDY.measure(STUDY.cells("quick")[0])
    assert {reading.failed for reading in found} == {"a rank idles 9.0 slots, the closed form says 0.5"}
