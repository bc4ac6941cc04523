"""The tables that set every arm against its baseline say what was changed and what came of it, and lead to records."""

from dataclasses import replace

import pytest

from ablations.catalogue import load
from ablations.comparison import Compared
from ablations.designs import Design, Factor, factorial, fractional, one_factor
from ablations.study import Arm, Study
from ablations.traced import Prose
from bench.record import Record
from dsv3.config import presets, vary
from reports.baseline import against_baseline

TINY = presets.tiny()
HEAD = ("arm", "difference [95%, t]", "[95%, exact]", "p exact", "p Holm (exact)", "detectable", "p TOST", "verdict")
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
    table = against_baseline(replace(study, compared=(replace(BITS, arms=("one",)),)), records)[1]
    assert table.caption == "bits per byte (bit/byte) minus none's, by seed (look training)"
    assert "beyond +-0.01 (a hundredth of a bit)" in table.note
    assert (
        "decided by the exact sign-flip test (p Holm, for a family of 1); no verdict before the 6 seeds" in table.note
    )
    assert table.rows[0] == (
        "one",
        "0.02 [0.017, 0.023] (n=6)",
        "[0.016, 0.024]",
        "0.031",
        "0.031",
        "0.0052",
        "1",
        "different",
    )
    assert table.head == HEAD
    difference = table.rows[0][1]
    assert isinstance(difference, Prose)
    assert difference.references[0].sources == {record.id for record in records[:12]}


def test_a_table_says_which_test_decides_and_why_and_what_was_declared(study: Study) -> None:
    records = [row(study, arm, seed, 2.0 + seed) for arm in ("none", "one") for seed in range(2)]
    table = against_baseline(study, records)[1]
    assert (
        "decided by the paired t test (p Holm, for a family of 2), as the exact sign-flip test of 2 finds nothing below"
        " 7 seeds; no verdict before the 6 seeds declared; detectable: by that test with power 0.8 at 0.05/2"
    ) in table.note
    assert table.head == tuple(name.replace("(exact)", "(t)") for name in HEAD)
    assert table.rows[0][0] == "one"
    assert table.rows[0][2:] == ("-", "-", "-", "-", "-", "needs the full profile (2 of 6 seeds)")
    assert table.rows[1] == ("words", *["-"] * 6, "needs the full profile (0 of 6 seeds)")
    moved = replace(study, compared=(replace(BITS, margin=0.02),))
    notes = [against_baseline(one, records)[1].note for one in (study, moved)]
    digests = [note.partition("declared as ")[2] for note in notes]
    assert len(set(digests)) == 2
    assert all(len(digest) == 12 for digest in digests)


def test_more_seeds_than_signs_can_be_tried_for_are_decided_by_t_and_say_so(study: Study) -> None:
    many = replace(study, seeds={"quick": 2, "full": 24})
    records = [row(study, arm, seed, 2.0 + 0.01 * seed) for arm in ("none", "one") for seed in range(24)]
    assert "as the signs of 24 pairs are too many to try" in against_baseline(many, records)[1].note


LR = Factor("lr", "train.optimizer.lr", {"usual": TINY.train.optimizer.lr, "low": 1e-3})
CLIP = Factor("clip", "train.clip_grad_norm", {"one": TINY.train.clip_grad_norm, "ten": 10.0})
DECAY = Factor("decay", "train.optimizer.weight_decay", {"some": TINY.train.optimizer.weight_decay, "none": 0.0})


def designed(study: Study, design: Design) -> Study:
    return replace(study, arms=design.arms, baseline="base", design=design)


def test_a_design_has_a_table_of_effects_that_lead_to_their_records(study: Study) -> None:
    made = designed(study, factorial(TINY, LR, CLIP))
    values = {"base": 2.0, "lr=low": 2.1, "clip=ten": 2.0, "lr=low,clip=ten": 2.4}
    noise = (0.0, 0.004, 0.007, 0.001, 0.009, 0.002, 0.005)
    records = [
        row(study, arm, seed, value + (noise[(seed + at) % 7] if at else 0.0))
        for at, (arm, value) in enumerate(values.items())
        for seed in range(7)
    ]
    *_, table = against_baseline(replace(made, seeds={"quick": 2, "full": 7}), records)
    assert table.caption == "bits per byte (bit/byte): effects of the factors, by seed (look training)"
    assert table.head == (
        "effect",
        "change [95%, t]",
        "p exact",
        "p Holm (exact)",
        "detectable",
        "n",
        "aliases",
        "verdict",
    )
    assert table.note.startswith("lr: usual -> low; clip: one -> ten; ")
    assert (
        "decided by the exact sign-flip test (p Holm, for a family of 3); no verdict before the 7 seeds" in table.note
    )
    names, changes, exact, holm, sight, counts, aliases, verdicts = zip(*table.rows, strict=True)
    assert names == ("lr", "clip", "lr x clip")
    assert [change.split()[0] for change in changes] == ["0.252", "0.152", "0.148"]  # 0.25, 0.15, 0.15 and the noise
    assert (set(exact), set(holm)) == ({"0.016"}, {"0.047"})
    assert all(float(size) > 0 for size in sight)
    assert (set(counts), set(aliases), set(verdicts)) == ({"7"}, {"-"}, {"different"})
    for cell in table.rows[0][1:6]:
        assert isinstance(cell, Prose)
        assert cell.references[0].sources == {record.id for record in records}


def test_effects_that_cannot_be_told_apart_stand_together(study: Study) -> None:
    design = fractional(TINY, LR, CLIP, DECAY, generators={"decay": ("lr", "clip")})
    records = [row(study, arm.name, seed, 2.0) for arm in design.arms for seed in range(2)]
    *_, table = against_baseline(designed(study, design), records)
    assert {line[0]: line[6] for line in table.rows} == {
        "lr": "-clip x decay",
        "clip": "-lr x decay",
        "decay": "-lr x clip",
    }


def test_effects_wait_for_the_last_arm_and_one_factor_at_a_time_has_none(study: Study) -> None:
    made = designed(study, factorial(TINY, LR, CLIP))
    records = [row(study, arm, seed, 2.0) for arm in ("base", "lr=low") for seed in range(6)]
    *_, table = against_baseline(made, records)
    assert (table.rows, table.note.rpartition("; ")[2]) == ((), "pending: no record of bits_per_byte of clip=ten")
    apart = designed(study, one_factor(TINY, LR, CLIP))
    assert not any("effects" in table.caption for table in against_baseline(apart, records))
    some = replace(made, compared=(replace(BITS, arms=("lr=low",)),))
    assert not any("effects" in table.caption for table in against_baseline(some, records))


def test_records_of_an_older_rule_are_not_tested(study: Study) -> None:
    records = [replace(row(study, arm, seed, 2.0), rule="0" * 12) for arm in ("none", "one") for seed in range(6)]
    assert len(against_baseline(study, records)) == 1
