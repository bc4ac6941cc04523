"""`python -m reports build` turns records into a report; `readme` writes the generated parts of README.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ablations.catalogue import every
from reports.build import Report, build, stale, write
from reports.readme import README, generated

_OUT = Path("reports", "out")


@dataclass(frozen=True)
class Build:
    """Tables, figures, pages and claims from the records of a folder."""

    out: Path = _OUT
    """folder with records.jsonl; the report goes there too"""
    check: bool = False
    """write nothing; fail where the report does not match the records"""


@dataclass(frozen=True)
class Readme:
    """The claim table and the figure of README.md, from the committed reference records."""

    check: bool = False
    """write nothing; fail where the README does not match the records"""


Command = Annotated[Build, tyro.conf.subcommand(name="build")] | Annotated[Readme, tyro.conf.subcommand(name="readme")]


def main(arguments: list[str] | None = None) -> int:
    """0: written, or as it should be; 1: `--check` found something stale; 2: the command cannot be carried out."""
    command: Any = tyro.cli(Command, prog="python -m reports", args=arguments)
    console = Console()
    try:
        return _build(command, console) if isinstance(command, Build) else _readme(command, console)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def _build(command: Build, console: Console) -> int:
    report = build(command.out, every())
    if command.check:
        return _say_stale(stale(command.out, report.files), f"python -m reports build --out {command.out}", console)
    write(command.out, report.files)
    console.print(_table(report))
    for line in report.skipped:
        console.print(f"left out line {line.line} of records.jsonl: {line.reason}", style="yellow", markup=False)
    console.print(f"report: {command.out / 'index.html'}", markup=False, soft_wrap=True)
    return 0


def _table(report: Report) -> Table:
    table = Table("study", "answer", title="what the measurements say", title_justify="left", show_lines=True)
    for page in report.pages:
        table.add_row(page.title, Text(" ".join(page.answers) or page.question))
    return table


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
    console.print(f"run: {remedy}" if names else "everything matches its records", markup=False)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
