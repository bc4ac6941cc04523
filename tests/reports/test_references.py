"""Every number in generated prose leads to its records; any other stops the build."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ablations.evidence import compare, estimate
from ablations.study import Study
from ablations.traced import Prose, Traced
from bench.fingerprint import Provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record, append, load
from reports.build import build
from reports.references import Declared, Numeral, check, declared, entries, numbered, numerals, unreferenced
from reports.verify import mentioned

Run = Callable[..., Path]


@pytest.mark.parametrize(
    "text, found",
    [
        ("fp16 and 1F1B of DeepSeek-V3 in zero_bubble_h1, n^2, torch 2.13.0, bf16_2", []),
        ("+0.0075 [-1.5, 2e-04], n=6", [0.0075, -1.5, 2e-4, 6]),
        ("70,272 bytes at 16K tokens, 2.3x, 41%", [70272, 16384, 2.3, 41]),
        ("4 / 8 / 16 ranks; 12.", [4, 8, 16, 12]),
    ],
)
def test_a_number_is_what_a_reader_takes_for_one(text: str, found: list[float]) -> None:
    assert [numeral.value for numeral in numerals(text)] == found


@pytest.mark.parametrize(
    "text, number, shown",
    [
        ("17%", 1 / 6, True),
        ("10.3%", 2.06 / 19.926, True),
        ("12%", 0.12, True),
        ("1.12", 1.12, True),
        ("1", 1.2, False),
        ("7", 6.8, False),
        ("0.12", 0.5, False),
    ],
)
def test_a_declared_number_may_be_rounded_but_not_to_one_figure(text: str, number: float, shown: bool) -> None:
    (numeral,) = numerals(text)
    assert isinstance(numeral, Numeral)
    assert numeral.shows(number) == shown


def test_words_and_declared_numbers_need_no_reference_and_others_do() -> None:
    marked = Prose.of(f"A share of 0.3 at 16K tokens takes {Traced(0.62, ('x',)):.2f}, not 0.42, of 7 as n=5 say.")
    known = Declared(numbers=frozenset({7.0}), axes={"length": frozenset({16384.0})})
    assert unreferenced(marked, ["keeps 0.3"], known) == ["0.42", "5"]


@pytest.mark.parametrize(
    "text, missing",
    [
        ("With 4 microbatches it idles on 4 / 8 / 16 ranks, at ranks 4 and 8, ranks=16", []),
        ("12% takes 22 / 52 or 64 microbatches", ["12%", "52"]),
        ("At 16K tokens, faster from 2048 tokens on; length 2048", []),
        ("It takes 2048 of them, 2048 bytes, and 4 times as long at 16", ["2048", "2048", "4", "16"]),
    ],
)
def test_a_value_of_an_axis_needs_the_axis_or_its_unit_beside_it(text: str, missing: list[str]) -> None:
    axes = {"microbatches": {4, 22, 64}, "ranks": {4, 8, 16}, "length": {2048, 16384}}
    known = Declared(axes={name: frozenset(map(float, values)) for name, values in axes.items()})
    assert unreferenced(text, [], known) == missing


def test_the_axes_of_what_is_missing_need_no_reference_in_a_pending_sentence_alone() -> None:
    said = "no record of loss of window, length=512, tosses=3"
    assert unreferenced(said, [], Declared(), pending=True) == []
    measured = "The gap is small, loss=0.123 and, speedup=7.31"
    assert unreferenced(measured, [], Declared()) == ["0.123", "7.31"]


def test_what_a_study_declares_tells_its_axes_from_its_constants(coin: Study) -> None:
    known = declared(coin, [])
    assert known.axes == {"tosses": {100.0, 1000.0}}
    assert 6.0 in known.numbers
    assert not known.numbers & {100.0, 1000.0}


def test_a_digit_beside_a_reference_is_not_covered_by_it() -> None:
    assert unreferenced(Prose.of(f"7{Traced(0.5, ('x',))}"), [], Declared()) == ["70.5"]


def planted(records: Sequence[Record]) -> str:
    lower = compare(records, arm="bent", baseline="fair", metric="loss", tosses=1000)
    return f"Bent coins show {lower} more heads, 0.777 of them by chance."


def honest(records: Sequence[Record]) -> str:
    kept = estimate(records, arm="bent", metric="loss", tosses=1000)
    return f"Of 1000 tosses {kept.value:.1%} are heads, over {kept.n} seeds."


def test_a_planted_number_stops_the_build_and_is_named(coin: Study, run: Run) -> None:
    with pytest.raises(ValueError, match=r"page='attention_sparsity': 0\.777 in 'Bent coins show .* has no reference"):
        build(run("full"), [replace(coin, answer=planted)])


def about_an_axis(records: Sequence[Record]) -> str:
    lower = compare(records, arm="bent", baseline="fair", metric="loss", tosses=1000)
    return f"The gap is small, loss=0.123, at {lower}."


def test_a_number_that_looks_like_an_axis_stops_the_build(coin: Study, run: Run) -> None:
    with pytest.raises(ValueError, match=r"0\.123 in 'The gap is small, .* axis whose name or unit stands beside it"):
        build(run("full"), [replace(coin, answer=about_an_axis)])


def test_what_is_missing_is_named_with_its_place(coin: Study, run: Run) -> None:
    def asks_for_more(records: Sequence[Record]) -> str:
        return f"{estimate(records, arm='bent', metric='loss', tosses=77)}"

    (answer, _) = build(run("full"), [replace(coin, answer=asks_for_more)]).pages[0].answers
    assert answer == "Pending: no record of loss of bent, tosses=77."


def test_a_planted_number_in_a_verdict_stops_the_build_too(coin: Study, run: Run) -> None:
    out = run("full")
    rule = coin.rules[0]

    def bent_is_lower(claim: object, records: Sequence[Record]) -> object:
        found = rule.judge(claim, records)  # type: ignore[arg-type]
        return replace(found, answer=f"{found.answer} That is 31 sigma.")

    study = replace(coin, rules=(replace(rule, judge=bent_is_lower), *coin.rules[1:]))  # type: ignore[arg-type]
    (out / "records.jsonl").unlink()
    append(out / "records.jsonl", [row for cell in coin.cells("full") for row in _measured(study, cell)])
    with pytest.raises(ValueError, match="31 in 'Bent coins show"):
        build(out, [study])


def _measured(study: Study, cell: object) -> list[Record]:
    from ablations.cell import to_record

    where = Provenance(machine="m", revision="abc123", profile="full")
    return [to_record(study, cell, reading, where, study.rule_digest()) for reading in study.measure(cell)]  # type: ignore[arg-type]


def test_every_id_of_the_page_is_one_of_the_records_and_every_record_is_reached(coin: Study, run: Run) -> None:
    out = run("full")
    report = build(out, [replace(coin, answer=honest)])
    page = report.files["index.html"].decode()
    there = {row.id for row in load(out / "records.jsonl").records}
    assert mentioned(page) == there, "each record stands behind a cell of some table"
    links = re.findall(r'<a class="ref" href="#ref-(\d+)">([^<]*)</a>', page)
    assert [text for _, text in links[:2]] == ["19.5%", "6"]
    assert report.references >= 4
    ids = re.search(r'<li id="ref-1">attention_sparsity: bent, loss at .*?<code class="ids">(.*?)</code>', page)
    assert ids is not None
    assert len(ids[1].split()) == 6, "one record per seed"


def test_the_text_report_is_plain(coin: Study, run: Run) -> None:
    text = build(run("full"), [replace(coin, answer=honest)]).files["report.md"].decode()
    assert "Of 1000 tosses 19.5% are heads, over 6 seeds." in text
    assert not re.search("[\ue000-\ue002]", text)


@pytest.mark.parametrize("source", ["0123456789ab", "train/log.jsonl:9", "bench.nowhere.f", "dsv3.model.cost.nothing"])
def test_a_source_that_is_not_there_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "log.jsonl").write_text("{}\n")
    numbers = numbered([Prose.of(f"{Traced(1.5, (source,))}")])
    with pytest.raises(ValueError, match="must lead somewhere"):
        entries(numbers, [], tmp_path)


def test_a_number_by_arithmetic_names_the_function(tmp_path: Path) -> None:
    numbers = numbered([Prose.of(f"{Traced(1.5, ('dsv3.model.cost.flops_per_token',))}")])
    (entry,) = entries(numbers, [], tmp_path)
    assert entry.points == (("by arithmetic: dsv3.model.cost.flops_per_token", ()),)


def test_a_plain_sentence_without_numbers_passes() -> None:
    check("p", "Pending: not run yet.", (), Declared())


def test_records_of_what_this_version_does_not_know_are_counted_and_left_out(coin: Study, run: Run) -> None:
    out = run()
    where = Provenance(machine="m", revision="r", profile="quick")
    row = record(Point(study=coin.name, arm="lost"), where, Measurement(metric="loss", value=1.0))
    strange = {**json.loads((out / "records.jsonl").read_text().splitlines()[0]), "metric": "sparkle"}
    del strange["id"], strange["schema"]
    append(out / "records.jsonl", [row, Record(**strange), row])
    report = build(out, [coin])
    assert report.left_out == (
        "records.jsonl: 3 records are of what this version does not know and were left out: arm 'lost' of "
        "attention_sparsity (2), metric 'sparkle' (1).",
    )
    assert "lost" not in {arm for page in report.pages for arm, _ in page.arms}


def test_of_two_machines_the_newest_speaks_and_the_page_says_so(coin: Study, run: Run) -> None:
    run("full", machine="old")
    out = run("full", machine="new")
    report = build(out, [coin])
    assert report.pages[0].aside == "Records of 2 machines: new speaks; 48 of old stand aside."
    assert report.pages[0].aside in report.files["index.html"].decode()
    new = {row.id for row in load(out / "records.jsonl").records if row.machine == "new"}
    assert mentioned(report.files["index.html"].decode()) == new
