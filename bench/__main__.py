"""Run the benchmark cases: `python -m bench [ROOM ...] --profile quick|full --device cpu|cuda --out reports/out`.

The quick profile runs all cases under pytest in one fresh process, which writes each record as its case ends. The full
profile runs file after file, each in five fresh processes whose records are joined, so that a kill costs one file.
Exit code 0: all cases passed; 1: a case failed (its error stands in the records); 2: nothing could run.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import fingerprint
from bench.record import Record, append, load
from bench.replicate import across_processes

HERE = Path(__file__).resolve().parent
PROCESSES = {"quick": 1, "full": 5}
NO_CASE = 5  # pytest's exit code when nothing matched
NEEDED = {"numpy": "numpy", "pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "jaxtyping": "jaxtyping"}
NEEDED |= {"rich": "rich", "scipy": "scipy", "torch": "torch", "transformers": "transformers"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and print what came out."""
    chosen = parser().parse_args(arguments)
    problems = (unknown_rooms, missing_packages, missing_device, unwritable)
    for find in problems:
        if problem := find(chosen):
            print(f"python -m bench: {problem}", file=sys.stderr)
            return 2
    from dsv3.moe.dispatch import chosen_here  # torch takes seconds, and what cannot run says so before

    fingerprint.save(chosen.out, experts=chosen_here())
    records, failed = run_cases(chosen)
    if not records:
        print(f"python -m bench: no case left a record; does -k {chosen.k!r} name one?", file=sys.stderr)
        return 2
    show(records)
    print(f"{len(records)} records in {chosen.out / 'records.jsonl'}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench", description="Run the benchmark cases and keep their records."
    )
    made.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(files())}; all of them by default")
    made.add_argument(
        "--profile", choices=("quick", "full"), default="quick", help="how long to measure, at which sizes"
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    made.add_argument("--out", type=Path, default=Path("reports/out"), help="folder for records.jsonl")
    made.add_argument("-k", default="", metavar="EXPRESSION", help="only cases whose name matches, as pytest's -k")
    made.add_argument("--processes", type=int, default=None, help="fresh processes; 1 in quick, 5 in full")
    return made


def files() -> dict[str, Path]:
    """The files of cases by the room that they measure."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def case_files(chosen: argparse.Namespace) -> list[Path]:
    """The files that the command line asks for."""
    return [path for room, path in files().items() if not chosen.rooms or room in chosen.rooms]


def unknown_rooms(chosen: argparse.Namespace) -> str | None:
    """Which of the rooms have no cases, or None."""
    unknown = [room for room in chosen.rooms if room not in files()]
    return f"no cases of {', '.join(unknown)}; there are cases of {', '.join(files())}" if unknown else None


def run_cases(chosen: argparse.Namespace) -> tuple[list[Record], bool]:
    """All records that the run added to <out>/records.jsonl, and whether a case failed."""
    count = chosen.processes or PROCESSES[chosen.profile]
    if count == 1:
        added, code = run_process(chosen, case_files(chosen), chosen.out, 0)
        return list(added), code not in (0, NO_CASE)
    kept: list[Record] = []
    failed = False
    for file in case_files(chosen):
        runs, codes = run_file(chosen, file, count)
        joined = across_processes(runs)
        append(chosen.out / "records.jsonl", joined)
        kept += joined
        failed = failed or any(code not in (0, NO_CASE) for code in codes)
    return kept, failed


def run_file(chosen: argparse.Namespace, file: Path, count: int) -> tuple[list[tuple[Record, ...]], list[int]]:
    """Records and exit codes of a file's cases in `count` fresh processes; one suffices to learn that it has none."""
    runs, codes = [], []
    with TemporaryDirectory(prefix="dsv3-bench-") as folder:
        for number in range(count):
            records, code = run_process(chosen, [file], Path(folder) / str(number), number)
            runs.append(records)
            codes.append(code)
            if code == NO_CASE:
                break
            print(f"{file.stem}: process {number + 1} of {count} done", flush=True)
    return runs, codes


def run_process(
    chosen: argparse.Namespace, cases: Sequence[Path], out: Path, number: int
) -> tuple[tuple[Record, ...], int]:
    """Run the cases under pytest with records in `out`: those it added, and pytest's exit code."""
    name = cases[0].stem if len(cases) == 1 else "bench"
    json_path = chosen.out / "benchmarks" / f"{name}-{chosen.profile}-{chosen.device}-{number}.json"
    json_path.parent.mkdir(parents=True, exist_ok=True)
    options = [f"--bench-profile={chosen.profile}", f"--bench-device={chosen.device}", f"--bench-out={out}"]
    options += [
        f"--benchmark-json={json_path}",
        "--benchmark-quiet",
        "-v",
        "--no-header",
        "-W",
        "ignore::pytest.PytestWarning",
    ]
    options += ["-k", chosen.k] if chosen.k else []
    command = [sys.executable, "-m", "pytest", *map(str, cases), "-c", str(HERE / "pytest.ini"), *options]
    before = len(load(out / "records.jsonl").records)
    code = subprocess.run(command, env=environment(), check=False).returncode
    return load(out / "records.jsonl").records[before:], code


def environment() -> dict[str, str]:
    """This process's variables, with the repository importable and the profiler's log lines off."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "KINETO_LOG_LEVEL": "99"}


def missing_packages(chosen: argparse.Namespace) -> str | None:
    """Which packages the cases lack, with the line that gets them; it never touches an installed torch."""
    absent = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if not absent:
        return None
    return f"missing {', '.join(absent)}; get them by: python -m pip install {' '.join(absent)}"


def missing_device(chosen: argparse.Namespace) -> str | None:
    """Why a GPU cannot be used, or None."""
    if chosen.device == "cpu":
        return None
    import torch

    if torch.cuda.is_available():
        return None
    return f"--device cuda: torch {torch.__version__} sees no GPU here; leave the option out to measure on the CPU"


def unwritable(chosen: argparse.Namespace) -> str | None:
    """Why the output folder cannot be written, or None; it is made."""
    out = chosen.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "records.jsonl").open("a").close()
    except OSError as error:
        return f"--out {out}: cannot be written ({error}); choose another folder"
    return None


def show(records: Sequence[Record]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    grid = Table("case", "arm", "metric", "value", "95% interval", "n", "where", box=None, header_style="bold")
    for record in records:
        where = " ".join(f"{name}={value}" for name, value in sorted(record.axes.items()))
        grid.add_row(record.study, record.arm, f"{record.metric} [{record.unit}]", *figures(record), where)
    # A file or pipe has no width of its own; 80 columns would break every row.
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(grid)


def figures(record: Record) -> tuple[str, str, str]:
    """Value, interval and n of a record as text; an error in place of the value."""
    if record.error is not None:
        return f"error: {record.error.splitlines()[0]}", "", "0"
    interval = "" if record.interval is None else f"{number(record.interval[0])} to {number(record.interval[1])}"
    return number(record.value), interval, f"{record.n} {record.over or ''}".strip()


def number(value: Any) -> str:
    """Whole numbers whole, others to four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
