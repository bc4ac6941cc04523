"""Records outlive a change of code that changes no figure, and none that does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ablations import __main__ as command
from ablations.adopt import Differs, adopt
from ablations.cache import cell_key, done
from ablations.catalogue import load as load_study
from ablations.run import remaining, run
from ablations.study import Study
from bench.record import append, load

COIN = Path(__file__).with_name("coin_study.py")
SAME = ("chance = random.Random(", "chance: random.Random = random.Random(")
OTHER = ("/ tosses\n", "/ tosses * 1.0000001\n")
FEWER = ('metric="peak_bytes", value=tosses)),\n', 'metric="peak_bytes", value=tosses)),\n    ][:1] + [\n')

Edited = Callable[..., tuple[str, Study]]


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    """The coin study after an edit: its path and the study, loaded anew."""

    def edit(*changes: tuple[str, str], name: str = "coin_edited") -> tuple[str, Study]:
        text = COIN.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path), load_study(str(path))

    return edit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the study of coins has run: two arms, two seeds."""
    folder, study = tmp_path_factory.mktemp("finished"), load_study(str(COIN))
    assert not [wrong for wrong in run(str(COIN), study, study.cells("quick"), "quick", folder, print) if wrong]
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_a_change_that_changes_no_figure_costs_one_cell_of_each_arm(out: Path, edited: Edited) -> None:
    old, (name, study) = load_study(str(COIN)), edited(SAME)
    before = (out / "records.jsonl").read_bytes()
    assert len(remaining(study, "quick", out).left) == 4
    found = adopt(name, study, "quick", out, reason="an annotation")
    assert [(cell.arm, cell.seed) for cell in found.measured] == [("fair", 0), ("bent", 0)]
    assert (len(found.carried), found.timed, found.missing) == (4, 0, 0)
    assert not remaining(study, "quick", out).left
    assert not remaining(old, "quick", out).left, "the old names stay"
    assert (out / "records.jsonl").read_bytes() == before
    lines = [json.loads(line) for line in (out / "adoptions.jsonl").read_text().splitlines()]
    assert {line["old"] for line in lines} == {cell_key(old, cell, "quick") for cell in old.cells("quick")}
    assert {line["new"] for line in lines} == {cell_key(study, cell, "quick") for cell in study.cells("quick")}
    assert {line["reason"] for line in lines} == {"an annotation"}
    assert [line["measured_again"] for line in lines] == [True, False, True, False]
    again = adopt(name, study, "quick", out, reason="twice")
    assert (again.measured, again.carried) == ((), ())


@pytest.mark.parametrize(
    "change, said",
    [
        (OTHER, r"fair tosses=1000 seed=0: value of fair loss device=cpu tosses=1000 was 0\.\d+ and is 0\.\d+"),
        (FEWER, "fair peak_bytes device=cpu tosses=1000 is no longer measured"),
    ],
)
def test_a_change_of_one_figure_adopts_nothing(out: Path, edited: Edited, change: tuple[str, str], said: str) -> None:
    name, study = edited(change)
    marks = done(out)
    with pytest.raises(Differs, match=said):
        adopt(name, study, "quick", out, reason="none")
    assert done(out) == marks
    assert not (out / "adoptions.jsonl").exists()


def test_the_command_refuses_with_the_first_difference(
    out: Path, edited: Edited, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _ = edited(OTHER)
    assert command.main(["adopt", name, "--reason", "none", "--out", str(out)]) == 1
    assert "nothing adopted: fair tosses=1000 seed=0: value of fair loss" in capsys.readouterr().out


def test_the_command_says_what_it_did(out: Path, edited: Edited, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = edited(SAME)
    assert command.main(["adopt", name, "--reason", "an annotation", "--out", str(out)]) == 0
    assert "4 cells carried over, 2 of them measured again and equal" in capsys.readouterr().out
    assert command.main(["adopt", name, "--reason", " ", "--out", str(out)]) == 2
    assert "reason=' ': must be text" in capsys.readouterr().out


def test_cells_that_hold_times_are_left_unless_asked_for(tmp_path: Path, edited: Edited) -> None:
    timed = (
        ('metrics=("loss", "peak_bytes"),', 'metrics=("loss", "peak_bytes", "cpu_seconds"),'),
        ('metric="peak_bytes", value=tosses)),', 'metric="cpu_seconds", value=time.perf_counter())),'),
        ("    rules=(", "    rules=() and ("),  # what is asked of bytes would find none
    )
    folder = tmp_path / "timed"
    name, study = edited(*timed, name="coin_timed")
    assert not [said for said in run(name, study, study.cells("quick"), "quick", folder, print) if said]
    name, study = edited(*timed, SAME, name="coin_timed_edited")
    found = adopt(name, study, "quick", folder, reason="an annotation")
    assert (found.measured, found.carried, found.timed) == ((), (), 4)
    assert len(remaining(study, "quick", folder).left) == 4
    found = adopt(name, study, "quick", folder, reason="an annotation", times=True)
    assert (len(found.carried), found.timed) == (4, 0)
    assert {json.loads(line)["times"] for line in (folder / "adoptions.jsonl").read_text().splitlines()} == {True}


def test_a_cell_that_lacks_a_record_is_left(out: Path, edited: Edited) -> None:
    path = out / "records.jsonl"
    rows = [row for row in load(path).records if (row.arm, row.seed, row.metric) != ("bent", 1, "peak_bytes")]
    path.unlink()
    append(path, rows)
    name, study = edited(SAME)
    found = adopt(name, study, "quick", out, reason="an annotation")
    assert (len(found.carried), found.missing) == (3, 1)
    assert [(cell.arm, cell.seed) for cell in remaining(study, "quick", out).left] == [("bent", 1)]


def test_records_of_another_rule_machine_or_profile_are_not_adopted(
    out: Path, edited: Edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, study = edited(("at_most=-0.1", "at_most=-0.2"))
    assert adopt(name, study, "quick", out, reason="a new rule").missing == 4
    name, study = edited(SAME)
    assert not adopt(name, study, "full", out, reason="another profile").carried
    monkeypatch.setattr("ablations.adopt.machine_id", lambda: "another")
    assert not adopt(name, study, "quick", out, reason="another machine").carried


@pytest.mark.parametrize("torn", ["{}", '{"cell": "k", "rec', '{"cell": "k", "records": 3}'])
def test_a_mark_that_cannot_be_read_costs_its_old_name_and_nothing_else(out: Path, edited: Edited, torn: str) -> None:
    path = out / "cells.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([torn, *others]) + "\n")
    name, study = edited(SAME)
    assert len(adopt(name, study, "quick", out, reason="an annotation").carried) == 4
    lines = [json.loads(line) for line in (out / "adoptions.jsonl").read_text().splitlines()]
    assert [line["old"] is None for line in lines].count(True) == 1
    assert json.loads(first)["cell"] not in {line["old"] for line in lines}
    assert not remaining(study, "quick", out).left


def test_a_cell_that_no_longer_runs_adopts_nothing(out: Path, edited: Edited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COIN_RAISES", "bent")
    name, study = edited(SAME)
    with pytest.raises(ValueError, match=r"cells=.*the coin rolled away.*must run as they did before"):
        adopt(name, study, "quick", out, reason="an annotation")
    assert not (out / "adoptions.jsonl").exists()
