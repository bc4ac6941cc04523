"""Another revision's dsv3 under today's measuring code."""

import shutil
import subprocess
import sys

import pytest

from bench.revision import ROOT, checked_out, environment, resolve


def test_a_process_started_in_the_tree_imports_its_dsv3_and_bench() -> None:
    with checked_out("HEAD") as tree:
        code = "import dsv3, bench; print(dsv3.__file__); print(bench.__file__)"
        done = subprocess.run(
            (sys.executable, "-c", code), env=environment(tree), capture_output=True, text=True, check=True
        )
        assert all(line.startswith(str(tree)) for line in done.stdout.split())
        assert (tree / "bench" / "revision.py").read_text() == (ROOT / "bench" / "revision.py").read_text()
    assert not tree.exists()


def test_a_module_that_the_revision_lacks_is_not_taken_from_an_editable_installation() -> None:
    with checked_out("HEAD") as tree:
        shutil.rmtree(tree / "dsv3" / "train")
        code = "import dsv3.model, dsv3.train"
        done = subprocess.run((sys.executable, "-c", code), env=environment(tree), capture_output=True, text=True)
        assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'dsv3.train'")


def test_the_tree_is_gone_after_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), checked_out("HEAD") as tree:
        raise RuntimeError("on purpose")
    assert (
        str(tree)
        not in subprocess.run(("git", "worktree", "list"), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize("name", ["no-such-revision", "", "--help"])
def test_a_revision_that_does_not_exist_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=r"revision=.*must name a commit"):
        resolve(name)
