"""A folder of records of the coin study, as a run would leave them, and the report on the reference records."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ablations.catalogue import every, load
from ablations.cell import to_record
from ablations.study import Reading, Study
from bench.fingerprint import Provenance, save
from bench.record import Profile, append
from reports.build import Report, build, write
from reports.readme import REFERENCE

COIN = Path(__file__).parents[1] / "ablations" / "coin_study.py"


@pytest.fixture(scope="session")
def coin() -> Study:
    return load(str(COIN))


@pytest.fixture
def run(coin: Study, tmp_path: Path) -> Callable[..., Path]:
    """Measure the study's cells in this process into a folder, some arms failing; returns the folder."""

    def run(profile: Profile = "quick", failing: str = "", machine: str = "m") -> Path:
        out = tmp_path / "out"
        where = Provenance(machine=machine, revision="abc123", profile=profile)
        for cell in coin.cells(profile):
            lost = [Reading(arm=str(cell.arm), metric="loss", failed="it <rolled> away & under | the table")]
            readings = lost if cell.arm == failing else coin.measure(cell)
            append(
                out / "records.jsonl",
                [to_record(coin, cell, reading, where, coin.rule_digest()) for reading in readings],
            )
        save(out)
        return out

    return run


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The committed reference records as a written report, not to be changed: its folder, and what was built."""
    out = tmp_path_factory.mktemp("reference")
    shutil.copytree(REFERENCE, out, dirs_exist_ok=True)
    report = build(out, every())
    write(out, report.files)
    return out, report
