"""The commands on studies.

`list` shows them; `diff NAME` says what each arm changes; `run NAME...` or `run --all` runs what is left of them;
`adopt NAME --reason "..."` keeps finished cells over a change of code that changes no figure.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ablations import STUDIES
from ablations.adopt import Differs, adopt
from ablations.catalogue import load
from ablations.code import experts_reached
from ablations.difference import Difference, differences
from ablations.ray_cluster import run_on_ray
from ablations.run import label, remaining, run
from ablations.study import Study
from bench.fingerprint import machine_id, save
from dsv3.config.rules import require

_OUT = Path("reports", "out")


@dataclass(frozen=True)
class List:
    """What each study asks, and how many of its cells are done, left and expected to take how long."""

    profile: Literal["quick", "full"] = "quick"
    """quick: two seeds, small sizes; full: what the rules of verdict ask"""
    out: Path = _OUT
    """folder of the records"""
    device: str = "cpu"
    """cpu or cuda"""


@dataclass(frozen=True)
class Run:
    """Run the cells that are left, each in a fresh process; what is done is not run again."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """studies by name, or paths of study files"""
    all: bool = False
    """every study"""
    on: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: a Ray cluster, that of RAY_ADDRESS or one started here"""
    profile: Literal["quick", "full"] = "quick"
    """quick: two seeds, small sizes; full: what the rules of verdict ask"""
    out: Path = _OUT
    """folder of the records"""
    device: str = "cpu"
    """cpu or cuda"""


@dataclass(frozen=True)
class Diff:
    """What each arm of a study changes against its baseline, and what is then not matched."""

    name: tyro.conf.Positional[str]
    """a study by name, or the path of a study file"""


@dataclass(frozen=True)
class Adopt:
    """Keep the records of finished cells over a change of code: one cell of each group is measured again, and every
    count and loss must come out bit for bit.
    """

    name: tyro.conf.Positional[str]
    """a study by name, or the path of a study file"""
    reason: str
    """why the change leaves the figures alone; goes into adoptions.jsonl"""
    times: bool = False
    """also cells that hold times, which nothing shows to be unchanged"""
    profile: Literal["quick", "full"] = "quick"
    """whose cells"""
    out: Path = _OUT
    """folder of the records"""
    device: str = "cpu"
    """cpu or cuda"""


Command = (
    Annotated[List, tyro.conf.subcommand(name="list")]
    | Annotated[Run, tyro.conf.subcommand(name="run")]
    | Annotated[Diff, tyro.conf.subcommand(name="diff")]
    | Annotated[Adopt, tyro.conf.subcommand(name="adopt")]
)


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: a cell failed, or a figure differs from the recorded one; 2: the command cannot be carried out."""
    command: Any = tyro.cli(Command, prog="python -m ablations", args=arguments)
    # A file or pipe has no width of its own; 80 columns would break every row.
    console = Console(stderr=isinstance(command, Run), width=None if sys.stdout.isatty() else 160)
    try:
        match command:
            case List():
                console.print(_table(command))
            case Diff():
                console.print(_arms(load(command.name)))
            case Adopt():
                return _adopt(command, console)
            case _:
                return _run(command, console)
        return 0
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 130


def _table(command: List) -> Table:
    table = Table(title=f"studies, {command.profile} profile", title_justify="left")
    table.add_column("study", no_wrap=True)
    table.add_column("question", overflow="fold")
    for heading in ("cells", "done", "left", "expected hours"):
        table.add_column(heading, justify="right")
    for name in STUDIES:
        study = load(name)
        todo = remaining(study, command.profile, command.out, command.device)
        numbers = (todo.cells, todo.cells - len(todo.left), len(todo.left))
        table.add_row(name, study.question, *map(str, numbers), f"{todo.hours:.2f}")
    return table


def _arms(study: Study) -> Table:
    table = Table("arm", "field: old -> new", "not matched", title_justify="left", show_lines=True)
    table.title = f"{study.name}: against {study.baseline}, {study.arm(study.baseline).changes}"
    for found in differences(study):
        unmatched = [f"{row.name} {row.ratio:.3g}x ({row.old:,.0f} -> {row.new:,.0f})" for row in found.unmatched]
        table.add_row(*map(Text, (found.arm, _changed(found), "\n".join((*unmatched, *found.unsettled)))))
    return table


def _changed(found: Difference) -> str:
    if not found.configured:
        return f"no config: {found.words}"
    return "\n".join(map(str, found.changes)) or f"nothing in the config: {found.words}"


def _adopt(command: Adopt, console: Console) -> int:
    known = vars(command) | {"name": _located(command.name), "study": load(command.name)}
    try:
        found = adopt(**known, on_cell=lambda cell: console.print(f"again: {label(cell)}", markup=False))
    except Differs as difference:
        console.print(f"nothing adopted: {difference}", style="red", markup=False)
        return 1
    console.print(f"{len(found.carried)} cells carried over, {len(found.measured)} of them measured again and equal")
    if found.timed:
        console.print(f"{found.timed} cells hold times and are left to be run; --times adopts them unshown")
    if found.missing:
        console.print(f"{found.missing} cells have no records to carry, or others than the one measured again")
    return 0


def _run(command: Run, console: Console) -> int:
    require(
        bool(command.names) != command.all,
        "names",
        command.names,
        "must name studies, or be left out for --all",
        "see list",
    )
    names = STUDIES if command.all else command.names
    studies = {_located(name): load(name) for name in names}
    out = command.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    left = any(remaining(study, command.profile, out, command.device).left for study in studies.values())
    if left or not (out / "machines" / f"{machine_id()}.json").exists():
        # Not of a finished study: a new time and load would make another report of the same records.
        save(out, experts=experts_reached(*(study.measure for study in studies.values())))
    failures = sum(_run_study(name, study, command, out, console) for name, study in studies.items())
    console.print(f"records in {command.out / 'records.jsonl'}; `python -m reports build` makes the report of them")
    return 1 if failures else 0


def _run_study(name: str, study: Study, command: Run, out: Path, console: Console) -> int:
    profile, on = command.profile, {"local": run, "ray": run_on_ray}[command.on]
    todo = remaining(study, profile, out, command.device)
    failures = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[cell]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(study.name, total=todo.cells, completed=todo.cells - len(todo.left), cell="")
        for wrong in on(name, study, todo.left, profile, out, lambda cell: progress.update(bar, cell=label(cell))):
            progress.advance(bar)
            if wrong:
                failures += 1
                progress.console.print(f"{study.name}: {wrong}", style="red", markup=False)
        progress.update(bar, cell=f"{failures} failed" if failures else "done")
    return failures


def _located(name: str) -> str:
    """The name as the process of a cell will find it, whatever folder it starts in."""
    return str(Path(name).resolve()) if name.endswith(".py") else name


if __name__ == "__main__":
    sys.exit(main())
