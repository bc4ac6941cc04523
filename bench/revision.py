"""Another revision's dsv3 under today's measuring code, so that only what is measured differs.

The revision is checked out as a git worktree in a temporary folder, and its bench/ gives way to today's. A process
started with that folder first on PYTHONPATH imports the old dsv3 and the new bench.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dsv3.config.rules import require

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with dsv3/ as of `revision` and bench/ as it stands now; gone afterwards.

    Raises:
        ValueError: there is no such revision, or no git repository.
    """
    commit = resolve(revision)
    with TemporaryDirectory(prefix="dsv3-revision-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns("__pycache__"))
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def resolve(revision: str) -> str:
    """The full hash of a revision's commit.

    Raises:
        ValueError: there is no such revision, or no git repository.
    """
    found = _run("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    rule = "must name a commit of this repository"
    require(found.returncode == 0, "revision", revision, rule, "see git log; a shallow clone lacks older ones")
    return found.stdout.strip()


def environment(tree: Path) -> dict[str, str]:
    """This process's variables, with that folder's packages before all others and no others of ours; one thread."""
    isolation = tree / "bench" / "isolation"  # see its sitecustomize.py
    path = os.pathsep.join(filter(None, (str(tree), str(isolation), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "KINETO_LOG_LEVEL": "99"}
    return os.environ | own | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _git(*arguments: str) -> None:
    done = _run(*arguments)
    if done.returncode:
        raise ValueError(f"git {arguments[0]} {arguments[1]} failed: {done.stderr.strip()}; mend the repository")


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
