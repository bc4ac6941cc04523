"""The project's jobs: each is a `python -m ...` in an environment that nox makes; what follows `--` is passed on.

    nox -s bench            train, measure, run the studies, write the report       -- --profile full
    nox -s tests            the tests, with every shape annotation checked          -- -k attention
    nox -s lint             ruff and mypy
    nox -s train            train a model                                           -- --preset tiny --steps 50
    nox -s ablate           the studies alone                                       -- run moe_capacity
    nox -s report           tables, figures, pages and claims from the records      -- --check
    nox -s gate             exact costs of a training step against expectations     -- --accept --reason "..."

The sessions share one environment, so that torch is installed once. nox's virtualenv backend is set because pip, unlike
uv, looks for wheels where the machine's own pip configuration says.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
ENVIRONMENT = str(Path(".nox", "dsv3"))
OUT = str(Path("reports", "out"))


def job(function):
    """A session in the shared environment."""
    return nox.session(venv_location=ENVIRONMENT, reuse_venv=True)(function)


def install(session: nox.Session, *groups: str) -> None:
    """The project in place, its dependencies and the named dependency groups, under the pinned versions."""
    extra = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install("--constraint", "constraints.txt", "--editable", ".[gpu]", *extra)


def profile(posargs: list[str]) -> list[str]:
    """The `--profile NAME` among the positional arguments, for the jobs that all take it."""
    if "--profile" not in posargs:
        return []
    at = posargs.index("--profile")
    return posargs[at : at + 2]


@job
def bench(session: nox.Session) -> None:
    """Train, measure, run the studies and write the report: the main job."""
    install(session)
    chosen = profile(session.posargs)
    session.run("python", "-m", "dsv3.train", "--preset", "tiny", "--out", str(Path(OUT, "train")))
    session.run("python", "-m", "bench", "--out", OUT, *session.posargs)
    session.run("python", "-m", "ablations", "run", "--all", "--out", OUT, *chosen)
    session.run("python", "-m", "reports", "build", "--out", OUT)


@job
def tests(session: nox.Session) -> None:
    """The tests; warnings are errors and every jaxtyping annotation of dsv3 is checked as it runs."""
    install(session, "test")
    session.run("python", "-m", "pytest", "--jaxtyping-packages=dsv3,beartype.beartype", *session.posargs)


@job
def lint(session: nox.Session) -> None:
    """ruff (rules and format) and mypy."""
    install(session, "test", "lint")
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@job
def train(session: nox.Session) -> None:
    """Train a model on real text."""
    install(session)
    session.run("python", "-m", "dsv3.train", *(session.posargs or ["--preset", "tiny"]))


@job
def ablate(session: nox.Session) -> None:
    """List or run the studies."""
    install(session)
    session.run("python", "-m", "ablations", *(session.posargs or ["list"]))


@job
def report(session: nox.Session) -> None:
    """Build the report from the records that are there."""
    install(session)
    session.run("python", "-m", "reports", "build", *session.posargs)


@job
def gate(session: nox.Session) -> None:
    """Exact costs of a training step against the committed expectations."""
    install(session)
    session.run("python", "-m", "bench.gate", *session.posargs)
