"""Two runs side by side: what changed, what did not, and what cannot be compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from bench.record import Record, append
from reports.__main__ import main
from reports.diff import BY_CHANCE, Diff, diff


def record(value: float | None, **more: object) -> Record:
    known = {"study": "s", "arm": "a", "metric": "loss", "unit": "nat/token", "noise": "exact", "value": value, "n": 1}
    known |= {"machine": "m", "revision": "r", "profile": "full", "time": "t", "seed": 0}
    return Record(**known | more)  # type: ignore[arg-type]


def runs(folder: Path, before: list[Record], after: list[Record]) -> tuple[Path, Path]:
    for name, rows in (("before", before), ("after", after)):
        append(folder / name / "records.jsonl", rows)
        (folder / name / "machines").mkdir()
        machine = rows[-1].machine
        (folder / name / "machines" / f"{machine}.json").write_text(json.dumps({"machine": machine, "time": name}))
    return folder / "before", folder / "after"


def verdicts(found: Diff) -> list[str]:
    return [point.verdict for point in found.points]


@pytest.mark.parametrize("value, verdict", [(1.0, "same"), (1.0000001, "changed")])
def test_an_exact_figure_has_changed_if_it_differs(tmp_path: Path, value: float, verdict: str) -> None:
    assert verdicts(diff(*runs(tmp_path, [record(1.0)], [record(value)]))) == [verdict]


def test_exact_figures_are_compared_seed_by_seed(tmp_path: Path) -> None:
    before = [record(value, seed=seed) for seed, value in enumerate((1.0, 5.0))]
    after = [record(value, seed=seed) for seed, value in enumerate((1.0, 5.1, 7.0))]
    assert verdicts(diff(*runs(tmp_path, before, after))) == ["changed"]


@pytest.mark.parametrize("shift, verdict", [(0.1, "same"), (10.0, "changed")])
def test_a_noisy_figure_has_changed_if_its_intervals_are_apart(tmp_path: Path, shift: float, verdict: str) -> None:
    before = [record(value, seed=seed, noise="absolute") for seed, value in enumerate((1.0, 1.1, 0.9))]
    after = [record(value + shift, seed=seed, noise="absolute") for seed, value in enumerate((1.0, 1.1, 0.9))]
    assert verdicts(diff(*runs(tmp_path, before, after))) == [verdict]


def test_how_many_noisy_points_differ_by_chance_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*more: Record) -> list[Record]:
        three = [(seed, 1.0 + seed / 10) for seed in range(3)]
        rows = [record(v, seed=s, noise="absolute", axes={"at": at}) for at in range(90) for s, v in three]
        return [*rows, record(1.0, arm="exact"), record(1.0, arm="alone", noise="absolute"), *more]

    before, after = runs(tmp_path, run(), run(record(1.0, arm="new")))
    assert diff(before, after).by_chance == "about 0.5 of 90 noisy points differ by chance"
    assert main(["diff", str(before), str(after)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "93 points: 1 new, 1 no interval, 91 same; about 0.5 of 90 noisy points differ by chance" in out


def test_exact_points_differ_by_no_chance(tmp_path: Path) -> None:
    assert diff(*runs(tmp_path, [record(1.0)], [record(2.0)])).by_chance == ""


@pytest.mark.parametrize("replicates", [3, 6])
def test_two_intervals_of_the_same_thing_are_apart_as_often_as_said(replicates: int) -> None:
    pairs = 200_000
    draws = np.random.default_rng(0).normal(size=(2, pairs, replicates))
    half = t.ppf(0.975, replicates - 1) * draws.std(axis=2, ddof=1) / replicates**0.5
    apart = np.abs(np.subtract(*draws.mean(axis=2))) > half.sum(axis=0)
    # A fifth around it: what the number of replicates moves it by, and four standard errors of this many pairs.
    assert apart.mean() == pytest.approx(BY_CHANCE, rel=0.2)


def test_a_figure_without_interval_has_no_verdict_and_points_come_and_go(tmp_path: Path) -> None:
    before = [record(1.0, noise="absolute"), record(1.0, arm="gone")]
    after = [record(2.0, noise="absolute"), record(1.0, arm="new")]
    found = diff(*runs(tmp_path, before, after))
    assert dict(zip([point.arm for point in found.points], verdicts(found), strict=True)) == {
        "a": "no interval",
        "gone": "gone",
        "new": "new",
    }


def test_a_noisy_figure_of_one_process_decides_nothing(tmp_path: Path) -> None:
    blocks = {"noise": "paired", "metric": "forward_cpu_ratio", "unit": "ratio", "seed": None, "n": 7, "over": "blocks"}
    before = [record(1.0, interval=(0.99, 1.01), **blocks)]
    after = [record(1.1, interval=(1.09, 1.11), **blocks)]
    assert verdicts(diff(*runs(tmp_path / "one", before, after))) == ["one process"]
    five = blocks | {"n": 5, "over": "processes"}
    before = [record(1.0, interval=(0.99, 1.01), **five)]
    assert verdicts(diff(*runs(tmp_path / "mixed", before, after))) == ["one process"]
    after = [record(1.1, interval=(1.09, 1.11), **five)]
    assert verdicts(diff(*runs(tmp_path / "five", before, after))) == ["changed"]


def test_what_of_a_folder_does_not_speak_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = runs(tmp_path, [record(1.0, machine="old"), record(1.0)], [record(1.0)])
    (after / "records.jsonl").write_text((after / "records.jsonl").read_text() + "{torn")
    found = diff(before, after)
    assert found.notes == (
        f"{before}: Records of 2 machines: m speaks; 1 of old stand aside.",
        f"{after}: 1 of 2 lines are no records and were left out: line 2 (Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)).",
    )
    assert main(["diff", str(before), str(after)]) == 0
    out = capsys.readouterr().out
    assert all(note in out for note in found.notes)


def test_a_folder_of_foreign_lines_says_why_it_holds_no_record(tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text('{"schema": 99}\n')
    with pytest.raises(ValueError, match=r"holds no records.jsonl.* 1 of 1 lines .*newer than 1.*update dsv3"):
        diff(tmp_path / "before", tmp_path / "after")


def test_the_newest_record_of_a_seed_speaks_and_errors_do_not(tmp_path: Path) -> None:
    before = [record(3.0), record(1.0), record(None, error="lost")]
    assert verdicts(diff(*runs(tmp_path, before, [record(1.0)]))) == ["same"]


def test_on_two_machines_times_are_left_out_and_the_machine_is_named(tmp_path: Path) -> None:
    seconds = {"metric": "cpu_seconds", "unit": "s", "noise": "absolute"}
    before, after = (
        [record(1.0), record(1.0, **seconds)],
        [record(1.0, machine="n"), record(9.0, machine="n", **seconds)],
    )
    found = diff(*runs(tmp_path, before, after))
    assert found.machines == (("machine", "m", "n"),)
    assert [point.metric for point in found.points] == ["loss"]
    assert found.left_out == 1


def test_the_command_prints_the_machines_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = runs(tmp_path, [record(1.0)], [record(2.0, machine="n")])
    assert main(["diff", str(before), str(after)]) == 0
    out = capsys.readouterr().out
    assert out.index("machine") < out.index("loss")
    assert main(["diff", str(before), str(tmp_path / "nowhere")]) == 2
    assert "holds no records" in " ".join(capsys.readouterr().out.split())


def test_records_of_a_metric_that_this_version_does_not_know_are_noted(tmp_path: Path) -> None:
    before, after = runs(tmp_path, [record(1.0), record(1.0, metric="sparkle")], [record(1.0)])
    found = diff(before, after)
    assert verdicts(found) == ["same"]
    assert found.notes == (
        f"{before}: 1 records are of what this version does not know and were left out: metric 'sparkle' (1).",
    )
