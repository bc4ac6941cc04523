"""A history with everything wrong that can be wrong says the same as its good records alone, and what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ablations.cache import done, mark
from ablations.catalogue import load as load_study
from ablations.claims import Outcome, ledger
from ablations.evidence import compare
from ablations.verdicts import verdict
from bench.fingerprint import saved
from bench.record import Record, append, load, to_line
from reports.build import build
from reports.diff import diff
from tests.statistics.draws import record

COIN = load_study(str(Path(__file__).parents[1] / "ablations" / "coin_study.py"))
GAP = {"fair": 0.5, "bent": 0.2}


def tossed(seeds: int, **more: object) -> list[Record]:
    """The coin study's losses at each seed, as if it had run."""
    known: dict[str, object] = {"study": COIN.name, "metric": "loss", "noise": "absolute", "rule": COIN.rule_digest()}
    return [
        record(heads + 0.01 * seed, arm=arm, seed=seed, axes={"tosses": 1000}, **known | more)
        for seed in range(seeds)
        for arm, heads in GAP.items()
    ]


def junk(good: Record) -> list[bytes]:
    """One line of each kind that is no record of ours."""
    line = to_line(good)
    newer = json.dumps(json.loads(line) | {"schema": 99})
    return [
        line[: len(line) // 2].encode(),
        newer.encode(),
        line.replace("fair", "foul").encode(),  # edited by hand: its id does not fit
        line.encode("utf-16"),
        b"\xff\xfe\x00garbage",
        b"\x00" * 512,
        b'{"time": 3}',
        b"[" * 5000,
        b"id,arm,value",
    ]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    append(tmp_path / "clean" / "records.jsonl", tossed(6))
    return tmp_path / "clean"


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """The same records between junk, older versions of themselves, another machine's, and failures since repaired."""
    good = tossed(6)
    path = tmp_path / "dirty" / "records.jsonl"
    append(path, [replace(row, value=9.0) for row in good])  # measured again later: equal ids, the later one stands
    append(path, tossed(6, machine="elsewhere"))
    append(path, [replace(row, value=None, n=0, error="lost") for row in good[:3]])
    for row, foreign in zip(good, [*junk(good[0]), b"", b" "], strict=False):
        append(path, [row])
        with path.open("ab") as file:
            file.write(foreign + b"\n")
    append(path, good[11:])
    with path.open("ab") as file:
        file.write(to_line(good[0]).encode()[:100])  # cut by a kill
    return tmp_path / "dirty"


def judged(folder: Path) -> tuple[Outcome, float | None, float | None, float | None, int]:
    found = verdict(ledger()["A3"], {COIN.name: COIN}, load(folder / "records.jsonl").records)
    return found.outcome, found.value, found.low, found.high, found.n


def test_a_verdict_is_that_of_the_good_records(clean: Path, dirty: Path) -> None:
    assert judged(dirty) == judged(clean)
    assert judged(clean)[0] is Outcome.HOLDS


def test_each_bad_line_is_counted_and_no_record_is_lost(clean: Path, dirty: Path) -> None:
    loaded = load(dirty / "records.jsonl")
    assert len(loaded.skipped) == len(junk(tossed(1)[0])) + 1
    assert len(loaded.records) == 12 + 12 + 3 + 12
    assert set(map(to_line, load(clean / "records.jsonl").records)) <= set(map(to_line, loaded.records))


def test_the_diff_with_the_clean_history_finds_nothing_and_says_what_it_left_out(clean: Path, dirty: Path) -> None:
    found = diff(clean, dirty)
    assert {point.verdict for point in found.points} == {"same"}
    bad, others = found.notes
    assert bad.startswith(f"{dirty}: 10 of 49 lines are no records and were left out: line")
    assert "newer than 1, which this dsv3 reads; update dsv3" in bad
    assert others == f"{dirty}: Records of 2 machines: m speaks; 12 of elsewhere stand aside."


def test_the_report_is_built_and_says_both(dirty: Path) -> None:
    text = build(dirty, [COIN]).files["report.md"].decode()
    assert "10 of 49 lines are no records and were left out" in text
    assert "2 machines: m speaks; 12 of elsewhere stand aside" in text
    assert "Bent coins show" in text


def test_one_seed_gives_a_value_without_interval_and_a_claim_without_verdict(tmp_path: Path) -> None:
    rows = tossed(1)
    found = compare(rows, arm="bent", baseline="fair", metric="loss", tosses=1000)
    assert (found.value, found.low, found.high, found.n) == (pytest.approx(-0.3), None, None, 1)
    ruled = verdict(ledger()["A3"], {COIN.name: COIN}, rows)
    assert (ruled.outcome, ruled.answer) == (Outcome.PENDING, "needs the full profile (1 of 6 seeds)")
    append(tmp_path / "records.jsonl", rows)
    assert "1 seed" in build(tmp_path, [COIN]).files["report.md"].decode()


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 9, b"\xff", b"{torn", b"[]", b"{}", b'{"records": 3}', b'{"records": [[]]}']
)
def test_a_mark_that_cannot_be_read_lets_its_cell_run_again(tmp_path: Path, content: bytes) -> None:
    rows = tossed(1)
    append(tmp_path / "records.jsonl", rows)
    mark(tmp_path, "whole", rows, 1.0)
    path = tmp_path / "cells.jsonl"
    path.write_bytes(content + b"\n" + path.read_bytes() + content)
    assert done(tmp_path) == {"whole"}
    mark(tmp_path, "next", rows, 1.0)
    assert done(tmp_path) == {"whole", "next"}


@pytest.mark.parametrize("content", [b"", b"\xff", b"{torn", b"[1]"])
def test_a_fingerprint_that_cannot_be_read_is_named_in_its_place(clean: Path, content: bytes) -> None:
    assert saved(clean, "m") == {"fingerprint": "missing: no machines/m.json"}
    (clean / "machines").mkdir()
    (clean / "machines" / "m.json").write_bytes(content)
    assert saved(clean, "m")["fingerprint"].startswith("unreadable: machines/m.json")
    assert "unreadable: machines/m.json" in build(clean, [COIN]).files["report.md"].decode()
    assert diff(clean, clean).machines == ()
