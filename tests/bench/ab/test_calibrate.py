"""The replay finds no alarm where nothing happened, finds what was slowed, and would notice a gate that errs."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from bench.ab import calibrate, worker
from bench.ab.block import ARMS, SLOWED, Block
from bench.ab.calibrate import COMPARED, NullBlock, fill, load, until_decided
from bench.ab.decide import Rate


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
    seconds = {"a": {arm: [0.001 * factor] * 24 for arm, factor in factors.items()}}
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


def test_measuring_code_is_what_it_does_and_not_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, source = calibrate.code(), Path(str(worker.__file__)).read_text()
    copy = tmp_path / "worker.py"
    monkeypatch.setattr(worker, "__file__", str(copy))
    copy.write_text(source.replace('"""Answer every request, in order."""', '"""Answer."""') + "\n# a comment\n")
    assert calibrate.code() == before
    copy.write_text(source.replace("gc.disable()", "pass"))
    assert calibrate.code() != before


def test_the_committed_runs_are_of_this_code_and_give_no_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    made = load(calibrate.NULL_BLOCKS)
    assert len({block.run for block in made}) >= 40
    found = calibrate.calibrate(made, budget=600.0, seed=1, trials=20)
    calibrate.show(Console(), made, found, 600.0)
    assert "false alarms of the whole suite: 0 of 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    "runs, blocks, budget, named", [(-1, 8, 600.0, "record=-1"), (1, 0, 600.0, "blocks=0"), (0, 8, 0.0, "budget=0.0")]
)
def test_a_bad_request_is_refused_before_anything_is_measured(
    runs: int, blocks: int, budget: float, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "record", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=named):
        calibrate.main(runs, blocks, budget)
