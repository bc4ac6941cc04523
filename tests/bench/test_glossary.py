"""The glossary in the README is what the table says."""

from pathlib import Path

import pytest

from bench import glossary
from bench.metrics import METRICS


def test_the_committed_glossary_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert glossary.main(["--check"]) == 0, capsys.readouterr().out


def test_the_table_has_a_row_for_each_metric() -> None:
    assert [line.split("`")[1] for line in glossary.table().splitlines()[2:]] == [row.name for row in METRICS]


def test_a_stale_glossary_is_found_and_then_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{glossary.BEGIN}\nold\n{glossary.END}\nbelow\n")
    monkeypatch.setattr(glossary, "README", readme)
    assert glossary.main(["--check"]) == 1
    assert "old" in readme.read_text()
    assert glossary.main([]) == 0
    assert glossary.main(["--check"]) == 0
    assert readme.read_text().startswith("above\n")
    assert readme.read_text().endswith("\nbelow\n")


def test_a_missing_marker_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="begin glossary"):
        glossary.refresh("no marker")
    with pytest.raises(ValueError, match="end glossary"):
        glossary.refresh(glossary.BEGIN)
