import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ablations import catalogue
from ablations.cell import to_record
from ablations.claims import ledger
from ablations.comparison import Compared
from ablations.study import Study
from bench.fingerprint import Provenance
from bench.measurement import Measurement, Point, record
from bench.record import Profile, append, load
from reports import __main__ as command
from reports.build import Report, build, stale, write
from reports.readme import REFERENCE
from reports.verify import mentioned

ROOT = Path(__file__).parents[2]
Run = Callable[..., Path]


class Page(HTMLParser):
    """What a page refers to, its ids, and whether its tags close."""

    VOID = ("meta", "br", "link", "img", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.open += [tag] if tag not in self.VOID else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes another tag"


def html(report: Report) -> str:
    return report.files["index.html"].decode()


def words(report: Report) -> str:
    """What a reader sees."""
    return Page(html(report)).text


def measured(study: Study, out: Path, profile: Profile = "quick") -> None:
    """Leave the records of a study without rules, as a run would."""
    where = Provenance(machine="m", revision="r", profile=profile)
    for cell in study.cells(profile):
        append(out / "records.jsonl", [to_record(study, cell, row, where, None) for row in study.measure(cell)])


def test_the_page_refers_to_nothing_outside_itself(coin: Study, run: Run) -> None:
    text = html(build(run(failing="bent"), [coin]))
    page = Page(text)
    assert page.open == [], "every tag is closed"
    assert len(set(page.ids)) == len(page.ids), "an id stands twice"
    inside = {f"#{name}" for name in page.ids}
    missing = {name for name in page.references if name not in inside}
    assert missing <= {f"#{row}" for row in _studies_elsewhere()}, "a reference leads nowhere"
    assert not re.search(r"https?:|@import|url\((?!#)|<script|<link", text)
    for name in re.findall(r"url\(#([^)]*)\)", text):
        assert name in page.ids


def _studies_elsewhere() -> set[str]:
    """Studies of claims that this report does not hold."""
    return {"moe_capacity", "moe_isolation", "pipeline_bubble", "precision_modes", "latent_attention", "multi_token"}


def test_the_same_records_give_the_same_bytes_in_another_process(coin: Study, run: Run) -> None:
    out = run("full")
    ours = build(out, [coin]).files
    code = (
        "import sys; from pathlib import Path; from hashlib import sha256; from reports.build import build;"
        "from ablations.catalogue import load; files = build(Path(sys.argv[1]), [load(sys.argv[2])]).files;"
        "print('\\n'.join(f'{sha256(data).hexdigest()} {name}' for name, data in files.items()))"
    )
    coin_file = str(ROOT / "tests" / "ablations" / "coin_study.py")
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), coin_file], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == [f"{sha256(data).hexdigest()} {name}" for name, data in ours.items()]
    assert {name for name in ours if name.endswith(".svg")} == {
        f"figures/attention_sparsity-{name}.svg" for name in ("heads", "gap", "missing")
    }


@pytest.mark.slow
def test_a_report_is_one_file_of_at_most_five_megabytes(reference: tuple[Path, Report]) -> None:
    _, report = reference
    assert len(report.files["index.html"]) <= 5 * 2**20
    assert report.references >= 90
    drawn = [figure for page in report.pages for figure in page.figures if "pending: " not in figure.inline]
    assert drawn
    assert all(figure.twin for figure in drawn), "each figure has its table"
    assert mentioned(html(report)) <= {row.id for row in load(REFERENCE / "records.jsonl").records}


def test_the_style_sheet_stands_in_the_page_unescaped(coin: Study, tmp_path: Path) -> None:
    text = html(build(tmp_path, [coin]))
    style = text[text.index("<style>") : text.index("</style>")]
    assert '"Segoe UI"' in style
    assert "&" not in style, "an escaped rule is none, and the page is set in whatever the browser has"


def test_the_head_names_the_machine_in_brief(coin: Study, run: Run) -> None:
    out = run()
    facts = {"processor": "Fast 9", "cores": 8, "memory_gib": 64, "gpus": ["H100"], "torch": "2.13", "machine": "m"}
    (out / "machines").mkdir(exist_ok=True)
    (out / "machines" / "m.json").write_text(json.dumps(facts))
    assert "m: Fast 9, 8 cores, 64 GiB, H100, torch 2.13" in words(build(out, [coin]))
    (out / "machines" / "m.json").write_text("{}")
    assert "Fast 9" not in words(build(out, [coin]))


def test_a_figure_carries_its_provenance(coin: Study, run: Run) -> None:
    files = build(run(), [coin]).files
    svg = files["figures/attention_sparsity-heads.svg"].decode()
    said = re.search(r"<dc:description>(.*?)</dc:description>", svg, flags=re.DOTALL)
    assert said is not None
    provenance = json.loads(said[1].replace("&quot;", '"'))
    assert provenance["records"] == 8
    assert provenance["machines"] == ["m"]
    assert b"digest" in files["figures/attention_sparsity-heads.png"]
    assert "dc:date" not in svg


def test_a_figure_without_data_says_what_is_missing(coin: Study, run: Run) -> None:
    text = build(run(), [coin]).files["figures/attention_sparsity-missing.svg"].decode()
    assert "pending: no record of flops yet" in text


def test_a_quick_run_says_that_its_seeds_are_few_and_gives_no_verdict(coin: Study, run: Run) -> None:
    text = words(build(run("quick"), [coin]))
    assert "2 of the 6 seeds that the full profile takes" in text
    assert "needs the full profile (2 of 6 seeds)" in text


def test_a_full_run_answers_with_numbers_and_a_verdict(coin: Study, run: Run) -> None:
    report = build(run("full"), [coin])
    text = words(report)
    assert "Quick profile" not in text
    assert re.search(r"Bent coins show -0\.\d+ \[-0\.\d+, -0\.\d+\] more heads\.", text)
    assert "holds here" in text
    assert "python -m ablations run attention_sparsity --profile full" in text
    text = report.files["report.md"].decode()
    assert "Bent coins show" in text
    assert f"| {ledger()['B2'].deepseek} |" in text, "a claim stands beside what DeepSeek does"


def test_what_failed_stays_in_the_report_as_text(coin: Study, run: Run) -> None:
    files = build(run(failing="bent"), [coin]).files
    assert "it &lt;rolled&gt; away &amp; under | the table" in files["index.html"].decode()
    assert "it <rolled> away & under \\| the table" in files["report.md"].decode()


def test_no_records_make_a_report_that_says_so(coin: Study, tmp_path: Path) -> None:
    report = build(tmp_path, [coin])
    assert set(report.files) == {"index.html", "report.md"}
    assert "No records yet" in html(report)
    assert "pending" in html(report)
    Page(html(report))


def test_where_every_cell_failed_the_page_does_not_say_that_none_ran(coin: Study, run: Run) -> None:
    out = run(failing="bent")
    rows = [row for row in load(out / "records.jsonl").records if row.error]
    (out / "records.jsonl").unlink()
    append(out / "records.jsonl", [replace(row, error="7 faces") for row in rows])
    page = build(out, [coin]).pages[0]
    assert page.answers == ("Pending: no cell could be measured; see why below.",)
    assert page.rulings[0].verdict.answer.startswith("every cell failed, first: 7 faces: python -m")


def test_a_page_says_that_its_means_are_of_several_revisions(coin: Study, run: Run) -> None:
    out = run("full")
    rows = load(out / "records.jsonl").records
    append(out / "records.jsonl", [replace(row, revision="def456") for row in rows if row.seed == 0])
    page = build(out, [coin]).pages[0]
    assert page.warning == "All points average records of several revisions."
    assert page.warning in build(out, [coin]).files["index.html"].decode()


def test_a_study_that_has_not_run_has_a_page_that_says_so(coin: Study, tmp_path: Path) -> None:
    point = Point(study="bench_coin", arm="fair", axes={"size": 3})
    where = Provenance(machine="m", revision="r", profile="quick")
    append(tmp_path / "records.jsonl", [record(point, where, Measurement(metric="flops", value=12))])
    report = build(tmp_path, [coin])
    pending = "Pending: python -m bench.budget --preset deepseek_v3"
    assert [page.answers for page in report.pages] == [("Pending: not run yet.",), (pending,), ()]
    assert [page.title for page in report.pages] == ["attention sparsity", "budget", "coin benchmark"]
    assert report.files.keys() == {"index.html", "report.md"}, "a study that has not run has no figures to say so"
    assert "missing: no machines/m.json" in html(report)


def test_a_study_that_the_report_was_not_given_is_said_to_be_one(coin: Study, run: Run) -> None:
    out = run("full")
    text = words(build(out, []))
    assert "No study of this report is named attention_sparsity." in text
    assert "here are its figures, without question, tests or verdict" in text
    assert "python -m reports build --study ablations/attention_sparsity.py" in text
    assert "attention sparsity benchmark" not in text
    assert build(out, [coin]).pages[0].tables == build(out, []).pages[-1].tables


def test_a_study_given_by_path_has_the_page_of_a_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "STUDIES", ())  # whose pending figures take a while to draw
    path = tmp_path / "tosses.py"
    coin_file = (ROOT / "tests" / "ablations" / "coin_study.py").read_text()
    path.write_text(re.sub(r"    rules=.*\n", "", coin_file.replace('name="attention_sparsity"', 'name="tosses"')))
    tosses, out = catalogue.load(str(path)), tmp_path / "out"
    measured(tosses, out)
    given = ["--out", str(out), "--study", str(path)]
    assert command.main(["build", *given]) == 0
    text = Page((out / "index.html").read_text()).text
    assert "Which coin shows more heads?" in text
    assert f"python -m ablations run {path} --profile quick\npython -m reports build --study {path}" in text
    assert command.main(["verify", *given]) == command.main(["build", "--check", *given]) == 0
    capsys.readouterr()
    (out / "report.md").write_text("edited")
    assert command.main(["build", "--check", *given]) == 1
    assert f"run: python -m reports build --out {out} --study {path}\n" in capsys.readouterr().out


def test_a_study_without_rules_answers_with_what_it_compares(coin: Study, tmp_path: Path) -> None:
    few = replace(coin, rules=(), compared=(Compared("loss", margin=0.1, why="a tenth", where={"tosses": 100}),))
    measured(few, tmp_path, "full")
    (answer,) = build(tmp_path, [few]).pages[0].answers
    assert answer.startswith("Loss (nat/token): fair 0.5")
    (last,) = build(tmp_path, [replace(few, compared=())]).pages[0].answers
    assert last.startswith("Loss (nat/token) at tosses 1000: fair 0.497")


def test_records_of_an_older_rule_are_shown_and_said_to_be(coin: Study, run: Run) -> None:
    out = run("full")
    changed = replace(coin, rules=coin.rules[:1])
    text = words(build(out, [changed]))
    assert "Pending: the rule of verdict was changed after these records; run again." in text
    assert "exploratory" in text
    assert re.search(r"Loss \(nat/token\) at tosses 1000: fair 0\.\d+ .*, bent 0\.\d+ ", text)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda line: "not a record", "Expecting value"),
        (lambda line: line[: len(line) // 2], "Expecting"),
        (lambda line: '{"name": "somebody else\'s line"}', "schema=None: must be 1"),
        (lambda line: line.replace('"schema": 1', '"schema": 2'), "newer than 1, which this dsv3 reads; update dsv3"),
        (lambda line: re.sub(r'"value": [^}]*', '"value": NaN', line), "NaN is no finite number"),
        (lambda line: line.replace('"arm": "fair"', '"arm": "bent"'), "was the line edited?"),
    ],
)
def test_bad_lines_are_named_and_counted_and_the_rest_is_shown(
    coin: Study, run: Run, spoil: Callable[[str], str], reason: str
) -> None:
    out = run()
    before = build(out, [coin])
    with (out / "records.jsonl").open("a") as file:
        file.write(spoil((out / "records.jsonl").read_text().splitlines()[0]) + "\n")
    report = build(out, [coin])
    assert report.left_out[0].startswith("records.jsonl: 1 of 9 lines are no records and were left out: line 9 (")
    assert reason in report.left_out[0]
    assert report.left_out[0] in words(report)
    assert report.left_out[0] in report.files["report.md"].decode()
    assert [page.tables for page in report.pages] == [page.tables for page in before.pages]


def test_a_report_is_stale_when_records_or_files_change(coin: Study, run: Run) -> None:
    out = run()
    write(out, build(out, [coin]).files)
    assert stale(out, build(out, [coin]).files) == []
    (out / "figures" / "old-figure.svg").write_text("")
    (out / "report.md").write_text("edited")
    assert stale(out, build(out, [coin]).files) == ["report.md", "figures/old-figure.svg"]
    write(out, build(out, [coin]).files)
    assert not (out / "figures" / "old-figure.svg").exists()
    run("full")
    assert "index.html" in stale(out, build(out, [coin]).files)


def test_the_command_ends_with_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'index.html'}"
    assert command.main(["build", "--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "index.html").write_text("")
    assert command.main(["build", "--out", str(tmp_path), "--check"]) == 1
    assert "stale: index.html" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--out", "/dev/null/x"]) == 2
    assert capsys.readouterr().out.startswith("error: ")
