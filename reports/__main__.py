"""`python -m reports build` turns records into a report; `verify` derives a written one anew; `diff A B` says what
changed between two runs; `readme` writes the generated parts of README.md.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ablations.catalogue import every
from reports.build import Report, build, stale, write
from reports.diff import diff
from reports.known import recorded
from reports.numbers import place
from reports.readme import README, generated
from reports.verify import summary, verify

_OUT = Path("reports", "out")


@dataclass(frozen=True)
class Build:
    """Tables, figures, pages and claims from the records of a folder."""

    out: Path = _OUT
    """folder with records.jsonl; the report goes there too"""
    study: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """the file of a study that is not in the list, which then has a page too; may be given again"""
    check: bool = False
    """write nothing; fail where the report does not match the records"""


@dataclass(frozen=True)
class Verify:
    """Derive a written report anew: every file, the provenance in every figure, every id that it mentions."""

    out: Path = _OUT
    """folder with records.jsonl and the report on them"""
    study: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """as the report was built with"""


@dataclass(frozen=True)
class Readme:
    """The claim table and the figure of README.md, from the committed reference records."""

    check: bool = False
    """write nothing; fail where the README does not match the records"""


@dataclass(frozen=True)
class Compare:
    """What changed between two runs, the machines first."""

    before: tyro.conf.Positional[Path]
    """folder with records.jsonl"""
    after: tyro.conf.Positional[Path]
    """folder with records.jsonl"""
    all: bool = False
    """also what did not change"""


Command = (
    Annotated[Build, tyro.conf.subcommand(name="build")]
    | Annotated[Verify, tyro.conf.subcommand(name="verify")]
    | Annotated[Compare, tyro.conf.subcommand(name="diff")]
    | Annotated[Readme, tyro.conf.subcommand(name="readme")]
)


def main(arguments: list[str] | None = None) -> int:
    """0: written, or as it should be; 1: `--check` or `verify` found what is not; 2: it cannot be carried out."""
    command: Any = tyro.cli(Command, prog="python -m reports", args=arguments)
    # A file or pipe has no width of its own; 80 columns would break every row.
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if isinstance(command, Compare):
            return _compare(command, console)
        if isinstance(command, Verify):
            return _verify(command, console)
        return _build(command, console) if isinstance(command, Build) else _readme(command, console)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def _build(command: Build, console: Console) -> int:
    report = build(command.out, recorded(command.out, command.study))
    if command.check:
        remedy = " ".join(("python -m reports build --out", str(command.out), *_given(command.study)))
        return _say_stale(stale(command.out, report.files), remedy, console)
    write(command.out, report.files)
    console.print(_table(report))
    for said in report.left_out:
        console.print(said, style="yellow", markup=False)
    console.print(f"{report.references} numbers in the prose refer to their records", markup=False)
    console.print(f"report: {command.out / 'index.html'}", markup=False, soft_wrap=True)
    return 0


def _given(studies: tuple[str, ...]) -> list[str]:
    return [word for study in studies for word in ("--study", study)]


def _verify(command: Verify, console: Console) -> int:
    found = verify(command.out, recorded(command.out, command.study))
    for line in found.wrong:
        console.print(line, style="red", markup=False, soft_wrap=True)
    console.print(summary(found, command.out), markup=False, soft_wrap=True)
    return 1 if found.wrong else 0


def _table(report: Report) -> Table:
    table = Table("study", "answer", title="what the measurements say", title_justify="left", show_lines=True)
    for page in report.pages:
        table.add_row(page.title, Text(" ".join(page.answers) or page.question))
    return table


def _compare(command: Compare, console: Console) -> int:
    found = diff(command.before, command.after)
    machines = Table("fingerprint", "before", "after", title="the machines", title_justify="left", box=None)
    for name, *runs in (("revision", *found.revisions), *found.machines):
        machines.add_row(name, *(Text(str(value)) for value in runs))
    console.print(machines)
    head = ("study", "arm", "metric", "where", "before", "after", "")
    points = Table(*head, title="the figures", title_justify="left", box=None)
    for point in found.points:
        if point.verdict != "same" or command.all:
            where = " ".join(f"{name}={place(value)}" for name, value in point.axes.items())
            values = ("-" if value is None else str(value) for value in (point.before, point.after))
            points.add_row(point.study, point.arm, point.metric, where, *map(Text, values), point.verdict)
    console.print(points)
    count = Counter(point.verdict for point in found.points)
    said = ", ".join(f"{number} {verdict}" for verdict, number in sorted(count.items()))
    apart = f"; {found.left_out} left out, as figures of two machines" if found.left_out else ""
    chance = f"; {found.by_chance}" if found.by_chance else ""
    console.print(f"{len(found.points)} points: {said}{apart}{chance}")
    for note in found.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    return 0


def _readme(command: Readme, console: Console) -> int:
    files = generated(README.read_text(), every())
    if command.check:
        names = [str(path) for path, data in files.items() if not path.is_file() or path.read_bytes() != data]
        return _say_stale(names, "python -m reports readme", console)
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0


def _say_stale(names: list[str], remedy: str, console: Console) -> int:
    for name in names:
        console.print(f"stale: {name}", style="red", markup=False)
    console.print(f"run: {remedy}" if names else "everything matches its records", markup=False, soft_wrap=True)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
