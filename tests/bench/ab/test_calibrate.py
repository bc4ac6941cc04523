"""The replay finds no alarm where nothing happened, finds what was slowed, and would notice a gate that errs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from types import ModuleType

import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bench.ab import block, calibrate, cases, recording, turns, worker
from bench.ab.__main__ import BUDGET
from bench.ab.block import Block
from bench.ab.calibrate import BEGIN, COMPARED, END, NullBlock, fill, groups, load, series, stated, until_decided
from bench.ab.decide import Rate
from bench.ab.turns import ARMS, SLOWED
from bench.glossary import README, between
from bench.meters import paired


def recorded(*, bias: float = 1.0, spread: float = 0.03, runs: int = 20) -> list[NullBlock]:
    """Runs of four blocks of 40 seconds; every slow-down as large as its name says."""
    random, factors = Random(0), (bias, 1.0, 1.05, 1.1, 1.2)
    return [
        NullBlock(
            run=f"run {at // 4}",
            took=40.0,
            load=5.0,
            ratios={
                case: [factor * random.lognormvariate(0.0, spread) for factor in factors] for case in ("a", "b", "c")
            },
        )
        for at in range(4 * runs)
    ]


def test_no_alarm_without_a_change_and_a_tenth_is_found() -> None:
    found = calibrate.calibrate(recorded(), budget=800.0, seed=0, trials=60)
    assert found.alarms == Rate(0, 60)
    assert found.withdrawn == Rate(0, 60)
    assert found.power["+10%"].happened >= 54
    assert found.power["+20%"].happened >= 59
    assert found.power["+5%"].happened <= found.power["+10%"].happened
    assert 6 <= found.blocks <= 20


def test_a_biased_machine_shows_in_the_alarms() -> None:
    found = calibrate.calibrate(recorded(bias=1.1), budget=800.0, seed=0, trials=20)
    assert found.alarms.happened >= 19
    assert found.withdrawn == Rate(0, 20), "only the head is biased"


def test_equal_seeds_give_equal_figures() -> None:
    once = calibrate.calibrate(recorded(), budget=400.0, seed=3, trials=5)
    assert calibrate.calibrate(recorded(), budget=400.0, seed=3, trials=5) == once


def test_a_trial_is_made_of_whole_runs_up_to_the_budget() -> None:
    made = recorded()
    drawn = fill(made, 600.0, Random(1))
    assert len(drawn) == 15, "15 blocks of 40 seconds"
    for start in range(0, 12, 4):
        first = made.index(drawn[start])
        assert first % 4 == 0
        assert drawn[start : start + 4] == made[first : first + 4]
    assert len(fill([replace(made[0], took=1000.0)], 600.0, Random(1))) == 1, "one block in any case, as the gate does"


def test_a_trial_stops_when_every_case_is_decided() -> None:
    quiet = recorded(spread=0.001)
    assert len(until_decided(quiet, dict.fromkeys("abc", "head"))) == 5
    assert len(until_decided(quiet[:3], dict.fromkeys("abc", "head"))) == 3


def test_a_recorded_block_is_read_back_as_its_ratios(tmp_path: Path) -> None:
    factors = dict(zip((*ARMS, *SLOWED), (1.0, 1.01, 0.99, 1.05, 1.1, 1.2), strict=True))
    seconds = {"a": {arm: [0.001 * factor] * 12 for arm, factor in factors.items()}}
    made = Block(seconds=seconds, unable={}, took=12.34, load=5.67)
    path = tmp_path / "null.jsonl"
    path.write_text(calibrate.line("run 1", made) + "\n")
    ratios = {"a": [factors[arm] for arm in COMPARED]}
    assert load(path) == [NullBlock(run="run 1", took=12.3, load=5.7, ratios=ratios)]


def test_blocks_of_other_measuring_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "null.jsonl"
    path.write_text(json.dumps({"code": "0" * 12, "run": "r", "took": 1.0, "load": 1.0, "ratios": {}}) + "\n")
    with pytest.raises(ValueError, match=r"code=.*today's measuring code.*--record 40"):
        load(path)
    with pytest.raises(ValueError, match="must hold recorded blocks"):
        load(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    "room, old, new",
    [
        (worker, "gc.collect()", "pass"),
        (cases, "calls=12", "calls=13"),
        (turns, "TURNS = 12", "TURNS = 13"),
        (block, "range(TURNS + 1)", "range(TURNS)"),
        (paired, "turned[::-1]", "turned"),
        (recording, "return median(ours / theirs", "return max(ours / theirs"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_measuring_code_is_what_it_does_and_not_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: ModuleType, old: str, new: str
) -> None:
    before, source, copy = calibrate.code(), Path(str(room.__file__)).read_text(), tmp_path / "room.py"
    monkeypatch.setattr(room, "__file__", str(copy))
    copy.write_text(source.replace('"""', '"""Says more. ', 1) + "\n# a comment\n")
    assert calibrate.code() == before
    assert source.count(old) == 1
    copy.write_text(source.replace(old, new))
    assert calibrate.code() != before


def test_the_committed_runs_are_of_this_code_and_the_readme_states_what_they_show() -> None:
    made = load(calibrate.NULL_BLOCKS)
    assert len({block.run for block in made}) >= 40
    trials = {"budget": BUDGET, "seed": 0, "trials": calibrate.TRIALS}
    found = {name: calibrate.calibrate(runs, **trials) for name, runs in groups(made).items()}
    assert [of.alarms for of in found.values()] == [Rate(0, calibrate.TRIALS)] * 2
    assert all(of.power["+10%"].happened >= 0.95 * calibrate.TRIALS for of in found.values())
    text = stated(made, found, BUDGET)
    assert between(README.read_text(), BEGIN, END, text) == README.read_text(), "python -m bench.ab --calibrate --write"


@pytest.mark.parametrize("arm", ["head", "control"])
def test_in_the_committed_runs_the_base_is_as_fast_as_itself(arm: str) -> None:
    """Student's t over the means of runs, whose blocks share an hour, Holm over the cases."""
    made = load(calibrate.NULL_BLOCKS)
    runs = sorted({block.run for block in made})
    p = {}
    for case in made[0].ratios:
        means = [
            fmean(math.log(r) for r in series([b for b in made if b.run == run], {case: arm})[case]) for run in runs
        ]
        assert abs(fmean(means)) < 0.005, f"{case}: a quarter of the margin"
        p[case] = stats.ttest_1samp(means, 0.0).pvalue
    assert not multipletests(list(p.values()), alpha=0.01, method="holm")[0].any(), p


def test_runs_on_a_busy_machine_stand_apart_whole() -> None:
    quiet = recorded(runs=3)
    busy = [replace(made, load=load) for made, load in zip(quiet[:8], [9.0, 9.0, 9.0, 4.9] + [7.0] * 4, strict=True)]
    assert groups([*busy, *quiet[8:]]) == {"all runs": [*busy, *quiet[8:]]}, "7.975 and 7 on average"
    raised = [replace(made, load=made.load + 0.1) for made in busy]
    assert groups([*raised, *quiet[8:]])["1 at load 8 or more"] == raised[:4]


def test_what_came_out_is_printed_and_written_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    monkeypatch.setattr(calibrate, "README", readme)
    monkeypatch.setattr(calibrate, "TRIALS", 5)
    monkeypatch.setattr(calibrate, "load", lambda path: recorded())
    assert calibrate.main(0, 4, 400.0) == 0
    text = capsys.readouterr().out
    assert "80 blocks without a change in 20 runs of 4 to 4, 40 s each" in text
    assert "| a false alarm in any case | 0 of 5 (95%: 0.0% to 52.2%) |" in text
    assert "old" in readme.read_text()
    assert calibrate.main(0, 4, 400.0, write=True) == 0
    assert readme.read_text() == f"above\n{BEGIN}\n{text}{END}\nbelow\n"


@pytest.mark.parametrize(
    "runs, blocks, budget, named", [(-1, 8, 600.0, "record=-1"), (1, 0, 600.0, "blocks=0"), (0, 8, 0.0, "budget=0.0")]
)
def test_a_bad_request_is_refused_before_anything_is_measured(
    runs: int, blocks: int, budget: float, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "record", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=named):
        calibrate.main(runs, blocks, budget)
