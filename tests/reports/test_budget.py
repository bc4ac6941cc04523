"""The page of the budgets, from records that the command wrote."""

from dataclasses import replace
from pathlib import Path

import pytest

from ablations.claims import ledger
from bench.budget.__main__ import main
from bench.record import Record, append, load
from reports.budget import budget_page, placed
from reports.build import build
from reports.pages import Page


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    assert main(["--preset", "tiny", "--sequence", "32", "--out", str(folder)]) == 0
    assert main(["--preset", "deepseek_v3", "--no-trace", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> tuple[Record, ...]:
    return load(out / "records.jsonl").records


@pytest.fixture(scope="module")
def page(records: tuple[Record, ...]) -> Page:
    return budget_page(records, {})


def test_without_records_the_page_says_how_to_get_them() -> None:
    page = budget_page([], {})
    assert page.answers == ("Pending: python -m bench.budget --preset deepseek_v3",)
    assert page.figures == ()


def test_the_page_says_how_far_arithmetic_and_trace_are_apart(page: Page) -> None:
    (answer,) = page.answers
    assert answer.startswith("Arithmetic and trace of tiny differ by at most 0.001% in size, ")
    assert "of the allocator's where the step fits in memory" in answer
    captions = [table.caption for table in page.tables]
    device, replicas, published = captions[:3]
    assert device == "Arithmetic against the trace of one device"
    assert (replicas, published) == ("One of several replicas of the whole model", "Published figures")
    assert {"Fullest rank: tiny", "Fullest rank: deepseek_v3", "A run by arithmetic"} <= set(captions)


def test_replicas_stand_in_a_table_of_their_own(page: Page) -> None:
    (table,) = (table for table in page.tables if table.caption.startswith("One of several"))
    what, peak = table.rows
    assert "dp64" in what[0]
    assert (what[1], what[-1]) == ("sent by a ring in a step", "+0.00%")
    assert peak[1] == "peak"


def test_how_far_the_arithmetic_of_ranks_is_off_stands_beside_them(page: Page, records: tuple[Record, ...]) -> None:
    (tiny, large) = (table.note for table in page.tables if table.caption.startswith("Fullest"))
    by_arm = {row.arm: row for row in records if row.metric == "live_bytes" and "split" not in row.axes}
    off = abs((by_arm["analytic"].value or 0) / (by_arm["traced"].value or 1) - 1)
    assert f"; for one device at most {100 * off:.3g}% from the traced peak. tp, pp, ep, dp: " in tiny
    assert "traced peak" not in large, "it was not traced"


def test_a_recipe_without_optimizer_state_is_no_deviation(tmp_path: Path) -> None:
    assert main(["--preset", "tiny", "--sequence", "16", "--recipe", "sgd", "--out", str(tmp_path)]) == 0
    page = budget_page(load(tmp_path / "records.jsonl").records, {})
    at = page.tables[0].head.index("optimizer bytes")
    assert page.tables[0].rows[0][at] == "+0.00%"


def test_running_the_command_again_changes_no_number_of_the_page(page: Page, records: tuple[Record, ...]) -> None:
    assert budget_page([*records, *records], {}) == page


def cells(page: Page, caption: str) -> list[str]:
    (table,) = (table for table in page.tables if table.caption == caption)
    return [cell for row in table.rows for cell in row]


@pytest.mark.parametrize(
    "arm, caption", [("analytic", "Arithmetic against the trace of one device"), ("ours", "Published figures")]
)
def test_a_missing_partner_is_drawn_as_missing(page: Page, records: tuple[Record, ...], arm: str, caption: str) -> None:
    alone = budget_page([row for row in records if row.arm != arm or row.metric == "rank_bytes"], {})
    assert "-" not in cells(page, caption)
    assert "-" in cells(alone, caption)
    assert len(cells(alone, caption)) == len(cells(page, caption))


def test_without_any_pair_the_answer_is_pending(records: tuple[Record, ...]) -> None:
    (answer,) = budget_page([row for row in records if row.arm == "traced"], {}).answers
    assert answer.startswith("Pending: ")


def test_a_rank_that_lacks_a_kind_has_a_gap_in_its_row_and_no_bar(records: tuple[Record, ...]) -> None:
    lacking = [row for row in records if row.axes.get("kind") != "total" or row.axes["model"] != "tiny"]
    assert cells(budget_page(lacking, {}), "Fullest rank: tiny").count("-") == len(
        [row for row in records if row.metric == "rank_bytes" and row not in lacking]
    )


def test_figures_without_their_records_are_pending(records: tuple[Record, ...]) -> None:
    page = budget_page([row for row in records if row.arm == "published"], {})
    assert [figure.name for figure in page.figures] == ["budget-ranks", "budget-hours"]
    assert all(b"pending: no record of it yet" in figure.files["svg"] for figure in page.figures)
    assert all(not figure.twin for figure in page.figures)


def test_an_error_stands_among_what_was_not_measured(records: tuple[Record, ...]) -> None:
    lost = replace(next(row for row in records if row.arm == "allocator"), value=None, n=0, error="out of memory")
    page = budget_page([*records, lost], {})
    assert page.failures is not None
    assert "out of memory" in page.failures.rows[0]
    assert cells(page, "Arithmetic against the trace of one device")[-1] == "-"


def test_records_that_stand_nowhere_on_the_page_are_counted(out: Path, records: tuple[Record, ...]) -> None:
    row = next(row for row in records if row.arm == "rank")
    adrift = [replace(row, axes={"model": "tiny", "kind": kind}) for kind in ("total", "working")]
    kept, said = placed([*records, *adrift, replace(row, arm="nobody")])
    assert tuple(kept) == records
    assert said == (
        "3 records of budget lack the axes that they are found by and were left out: rank_bytes of rank (2), "
        "rank_bytes of nobody (1)."
    )
    torn = out.with_name("torn")
    append(torn / "records.jsonl", [*records, *adrift])
    assert build(torn, []).left_out[0].startswith("records.jsonl: 2 records of budget lack")


def test_the_report_has_the_page_with_both_figures_and_their_tables(out: Path) -> None:
    report = build(out, [])
    assert {"figures/budget-ranks.svg", "figures/budget-hours.png"} <= report.files.keys()
    page = next(page for page in report.pages if page.name == "budget")
    assert all(figure.twin for figure in page.figures)
    assert [row.claim.id for row in page.rulings] == ["H1", "H2"]
    assert {row.verdict.outcome for row in page.rulings} == {ledger()["H1"].ruled}
    assert build(out, []).files == report.files
