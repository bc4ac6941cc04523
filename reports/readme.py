"""The generated parts of README.md: one reference figure and the claim table, from the committed reference records.

A part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; what is between is overwritten, the rest is prose.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ablations.code import ROOT
from ablations.study import Study
from bench.record import load
from reports.pages import Ruling, rulings, study_page

README = ROOT / "README.md"
REFERENCE = ROOT / "reports" / "reference"
FIGURE = ("pipeline_bubble", "share_at_16_ranks")  # the study and figure of the first screen


def generated(text: str, studies: Sequence[Study], reference: Path = REFERENCE) -> dict[Path, bytes]:
    """The files that `python -m reports readme` writes, given the README's text: the README itself and its figure.

    Raises:
        ValueError: the README lacks the markers of a part.
    """
    records = load(reference / "records.jsonl").records
    ruled = rulings(studies, records)
    parts = {"claims": claim_table(ruled)}
    files = {}
    for study in studies:
        if study.name == FIGURE[0]:
            page = study_page(study, records, {row.claim.id: row.verdict for row in ruled})
            drawn = next(figure for figure in page.figures if figure.name == "-".join(FIGURE))
            files[reference / f"{drawn.name}.svg"] = drawn.files["svg"]
            link = (reference / f"{drawn.name}.svg").relative_to(README.parent).as_posix()
            parts["figure"] = f"![{drawn.caption}]({link})\n\n{' '.join(page.answers)}"
    return files | {README: with_parts(text, parts).encode()}


def claim_table(ruled: Sequence[Ruling]) -> str:
    """Every claim with its verdict, beside what DeepSeek does, as a Markdown table."""
    rows = [
        f"| {row.claim.id} | {row.claim.words} | {row.claimed} | {row.verdict.outcome} | {row.verdict.answer} "
        f"| {row.claim.deepseek} |"
        for row in ruled
    ]
    head = "| | claim | claimed | verdict | found here | DeepSeek |", "| --- | --- | ---: | --- | --- | --- |"
    return "\n".join((*head, *rows))


def with_parts(text: str, parts: Mapping[str, str]) -> str:
    """The text with each part's content between its markers.

    Raises:
        ValueError: a part whose markers do not stand in the text exactly once.
    """
    for name, content in parts.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README.md: part {name!r} lacks its markers; put {begin.strip()} and {end} there once")
        text = text[: text.index(begin)] + begin + content + "\n" + text[text.index(end) :]
    return text
