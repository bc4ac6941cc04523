"""The page of the budgets, from records that the command wrote."""

from pathlib import Path

import pytest

from ablations.claims import ledger
from bench.budget.__main__ import main
from bench.record import Record, load
from reports.budget import budget_page
from reports.build import build


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    assert main(["--preset", "tiny", "--sequence", "32", "--out", str(folder)]) == 0
    assert main(["--preset", "deepseek_v3", "--no-trace", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> tuple[Record, ...]:
    return load(out / "records.jsonl").records


def test_without_records_the_page_says_how_to_get_them() -> None:
    page = budget_page([], {})
    assert page.answers == ("Pending: python -m bench.budget --preset deepseek_v3",)
    assert page.figures == ()


def test_the_page_says_how_far_arithmetic_and_trace_are_apart(records: tuple[Record, ...]) -> None:
    page = budget_page(records, {})
    (answer,) = page.answers
    assert answer.startswith("Arithmetic and trace of tiny differ by at most ")
    assert "of the allocator's where the step fits in memory" in answer
    captions = [table.caption for table in page.tables]
    assert captions[:2] == ["Arithmetic against the trace of one device", "Published figures"]
    assert {"Fullest rank: tiny", "Fullest rank: deepseek_v3", "A run by arithmetic"} <= set(captions)


def test_running_the_command_again_changes_no_number_of_the_page(records: tuple[Record, ...]) -> None:
    once, twice = budget_page(records, {}), budget_page([*records, *records], {})
    assert once == twice


def test_the_report_has_the_page_with_both_figures_and_their_tables(out: Path) -> None:
    report = build(out, [])
    assert {"figures/budget-ranks.svg", "figures/budget-hours.png"} <= report.files.keys()
    page = next(page for page in report.pages if page.name == "budget")
    assert all(figure.twin for figure in page.figures)
    assert [row.claim.id for row in page.rulings] == ["H1", "H2"]
    assert {row.verdict.outcome for row in page.rulings} == {ledger()["H1"].ruled}
    assert build(out, []).files == report.files
