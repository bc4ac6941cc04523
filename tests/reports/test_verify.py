"""`verify` derives a written report anew and names what is not as its records say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ablations.study import Study
from bench.record import load
from reports import __main__ as command
from reports.build import build, write
from reports.verify import summary, verify

Run = Callable[..., Path]


@pytest.fixture
def out(coin: Study, run: Run) -> Path:
    folder = run("full")
    write(folder, build(folder, [coin]).files)
    return folder


def test_a_report_as_it_was_written_holds(coin: Study, out: Path) -> None:
    found = verify(out, [coin])
    assert found.wrong == ()
    assert (found.files, found.figures) == (8, 6)
    assert found.ids == len({row.id for row in load(out / "records.jsonl").records})
    assert summary(found, out).endswith("all as the records say")


def test_an_edited_number_is_found(coin: Study, out: Path) -> None:
    page = out / "index.html"
    page.write_text(page.read_text().replace("-0.2", "-0.9", 1))
    assert verify(out, [coin]).wrong == ("index.html: not the bytes that the records give",)


def test_a_picture_of_other_records_is_named_with_both_digests(coin: Study, out: Path, run: Run) -> None:
    picture = out / "figures" / "attention_sparsity-heads.png"
    old = picture.read_bytes()
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(lines[2:]))
    write(out, build(out, [coin]).files)
    picture.write_bytes(old)
    wrong = verify(out, [coin]).wrong
    assert wrong[0] == "figures/attention_sparsity-heads.png: not the bytes that the records give"
    assert "shows other records: digest" in wrong[1]
    assert "records 48 (records: 46)" in wrong[1]


def test_an_id_that_no_record_has_is_named(coin: Study, out: Path) -> None:
    page = out / "index.html"
    known = load(out / "records.jsonl").records[0].id
    page.write_text(page.read_text().replace(known, "0123456789ab"))
    assert "index.html: no record has the id 0123456789ab" in verify(out, [coin]).wrong


def test_a_picture_that_says_nothing_is_named(coin: Study, out: Path) -> None:
    (out / "figures" / "attention_sparsity-gap.svg").write_text("<svg/>")
    assert any("must be the JSON that says" in line for line in verify(out, [coin]).wrong)


def test_the_command_fails_where_something_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--out", str(tmp_path)]) == 0
    assert command.main(["verify", "--out", str(tmp_path)]) == 0
    (tmp_path / "report.md").write_text("edited")
    assert command.main(["verify", "--out", str(tmp_path)]) == 1
    assert "report.md: not the bytes that the records give" in capsys.readouterr().out
