"""The project's jobs: each is a `python -m ...` in an environment that nox makes; what follows `--` is passed on.

    nox -s bench            train, measure, run the studies, write the report       -- --profile full
    nox -s tests            the tests, with every shape annotation checked          -- -k attention
    nox -s lint             ruff and mypy
    nox -s train            train a model                                           -- --preset tiny --steps 50
    nox -s ablate           the studies alone                                       -- run moe_capacity
    nox -s report           tables, figures, pages and claims from the records      -- --check
    nox -s gate             exact costs of small pieces of work against expectations   -- --accept --reason "..."
    nox -s ab               times of the working tree against a revision, in pairs  -- main --budget 600

The jobs share the environment that the session `environment` makes, so that torch is installed once. nox's virtualenv
backend is set because pip, unlike uv, looks for wheels where the machine's own pip configuration says.
"""

import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHON = str(Path(".nox", "environment", "Scripts" if os.name == "nt" else "bin", "python").absolute())
OUT = str(Path("reports", "out"))
SHAPED = ("attention", "data", "layers", "model", "moe", "parallel", "precision", "train")
# A thread that waits gives its core away: spinning, two threads on a shared machine took five times as long as one.
PATIENT = {"OMP_WAIT_POLICY": "passive"}
# Tests multiply small matrices: threads would wait for each other longer than they work, above all on a shared machine.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# A worker per core; a file's tests stay together, since they share what is dear to make. `-- -n 0` runs them in turn.
SIDE_BY_SIDE = (
    *("-n", "logical", "--maxprocesses", "8", "--dist", "loadscope", "--no-loadscope-reorder"),
    *("--durations", "25"),
)
CHECKED = ",".join(f"dsv3.{room}" for room in SHAPED)

job = nox.session(requires=["environment"], venv_backend="none")


def module(session: nox.Session, *arguments: str, passing: tuple[int, ...] = (0,), **environment: str) -> None:
    """Run `python -m ...` in the shared environment."""
    session.run(PYTHON, "-m", *arguments, env=PATIENT | environment, success_codes=passing)


def profile(posargs: list[str]) -> list[str]:
    """The `--profile NAME` among the positional arguments, for the jobs that all take it."""
    if "--profile" not in posargs:
        return []
    at = posargs.index("--profile")
    return posargs[at : at + 2]


@nox.session(reuse_venv=True, default=False)
def environment(session: nox.Session) -> None:
    """The project in place, its dependencies and its tools, under the pinned versions."""
    groups = nox.project.dependency_groups(PYPROJECT, "test", "lint")
    session.install("--constraint", "constraints.txt", "--editable", ".[gpu]", *groups)


@job
def bench(session: nox.Session) -> None:
    """Train, measure, run the studies and write the report: the main job."""
    chosen = profile(session.posargs)
    parts = (
        ("dsv3.train", "--preset", "tiny", "--steps", "100", "--out", str(Path(OUT, "train")), "--overwrite"),
        ("bench", "--out", OUT, *session.posargs),
        ("bench.budget", "--preset", "deepseek_v3", "--out", OUT),
        ("ablations", "run", "--all", "--out", OUT, *chosen),
    )
    failed = [part[0] for part in parts if not runs(session, *part)]
    module(session, "reports", "build", "--out", OUT)
    if failed:
        session.error(f"failed: {', '.join(failed)}; the report has the rest")


def runs(session: nox.Session, *arguments: str) -> bool:
    """Whether `python -m ...` succeeded: one that failed must not keep the report from the others."""
    try:
        module(session, *arguments)
    except nox.command.CommandFailed:
        return False
    return True


@job
def tests(session: nox.Session) -> None:
    """The tests; warnings are errors and every annotation of a room with shapes is checked as it runs."""
    checked = f"--jaxtyping-packages={CHECKED},tests.shapes.check"
    module(session, "pytest", checked, *SIDE_BY_SIDE, *session.posargs, **ONE_THREAD)


@job
def lint(session: nox.Session) -> None:
    """ruff (rules and format) and mypy."""
    module(session, "ruff", "check", *session.posargs, ".")
    module(session, "ruff", "format", "--check", ".")
    module(session, "mypy")


@job
def train(session: nox.Session) -> None:
    """Train a model on real text."""
    module(session, "dsv3.train", *(session.posargs or ["--preset", "tiny"]))


@job
def ablate(session: nox.Session) -> None:
    """List or run the studies."""
    module(session, "ablations", *(session.posargs or ["list"]))


@job
def report(session: nox.Session) -> None:
    """Build the report from the records that are there."""
    module(session, "reports", "build", *session.posargs)


@job
def gate(session: nox.Session) -> None:
    """Exact costs of training, serving and plans against the committed expectations; a machine without any passes.

    It fails with 1 where something costs more, 2 where the gate could not do its work, 4 where figures do not repeat, 5
    where something costs less.
    """
    module(session, "bench.gate", *session.posargs, passing=(0, 3))


@job
def ab(session: nox.Session) -> None:
    """Times of the working tree against a revision; too little evidence and a gain pass, a tree that fails does not."""
    module(session, "bench.ab", *session.posargs, passing=(0, 3, 5))
