"""Each check of the gates is there because some test needs it: take it out, and the test named beside it fails.

The table is gate_mutations.toml. A mutation replaces one piece of a module's source and runs the module anew under its
own name, and after it those that take names from it; then the named test runs inside. All of them pass on the source as
it is, run anew in the same way.
"""

import gc
import importlib
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

# What is imported inside a run would be forgotten at its end, and imported again beside what others hold.
import bench.ab.__main__
import bench.ab.judge
import bench.ab.turns
import bench.compiled
import bench.differences
import bench.expectations
import bench.gate
import bench.instructions
import bench.pytest_gate
import bench.stability
import bench.structure

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# By package: the modules that take names from its others.
USERS = {"": ("expectations", "gate"), "ab": ("ab.judge", "ab.__main__")}


@pytest.fixture(scope="module", autouse=True)
def _the_compiler_is_imported() -> None:
    """Parts of torch's compiler register themselves where they are imported, and refuse a second time: a first use
    inside a run would be forgotten at its end, and the next one, in some later file of tests, fail.
    """
    bench.compiled.measure_compiled(lambda x: x.sin().sum(), [(torch.ones(2, requires_grad=True),)])


@dataclass(frozen=True)
class Mutation:
    """A check taken out of the module bench.<module>, and the test in tests/bench/test_<tests>.py that notices.

    `ab/decide` stands for tests/bench/ab/test_decide.py.
    """

    says: str
    module: str
    old: str
    new: str
    tests: str
    noticed_by: str


TABLE = tomllib.loads((HERE / "gate_mutations.toml").read_text())["mutation"]
MUTATIONS = tuple(Mutation(**row) for row in TABLE)


@contextmanager
def run_anew(name: str, old: str = "", new: str = "") -> Iterator[None]:
    """A module of bench run anew with `old` replaced by `new`, and after it those that take names from it."""
    changed = importlib.import_module(f"bench.{name}")
    users = [importlib.import_module(f"bench.{each}") for each in USERS[name.rpartition(".")[0]] if each != name]
    saved = [(module, dict(vars(module))) for module in (changed, *users)]
    try:
        execute(changed, source(changed).replace(old, new) if old else source(changed))
        for user in users:
            execute(user, source(user))
        yield
    finally:
        for module, names in saved:
            vars(module).clear()
            vars(module).update(names)
        gc.enable()  # which a mutation may have left off


def source(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text()


def execute(module: ModuleType, text: str) -> None:
    exec(compile(text, str(module.__file__), "exec"), vars(module))


def run(pytester: pytest.Pytester, patch: pytest.MonkeyPatch, tests: str, *names: str) -> pytest.RunResult:
    """Run those tests of a file in this process."""
    path = (HERE / tests).with_name(f"test_{Path(tests).name}.py")
    ids = [f"{path}::{name}" for name in names]
    for held in [held for held in sys.modules if held.rpartition(".")[2] == path.stem]:
        patch.delitem(sys.modules, held)  # one that was collected before holds names of the old source
    settings = (f"--rootdir={ROOT}", "-c", f"{ROOT}/pyproject.toml")
    return pytester.runpytest_inprocess("-q", "-x", "-p", "no:cacheprovider", "-p", "no:logging", *settings, *ids)


@pytest.mark.parametrize("module, tests", sorted({(mutation.module, mutation.tests) for mutation in MUTATIONS}))
def test_the_tests_that_notice_pass_on_the_source_as_it_is(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, module: str, tests: str
) -> None:
    of_module = [mutation for mutation in MUTATIONS if (mutation.module, mutation.tests) == (module, tests)]
    names = sorted({mutation.noticed_by for mutation in of_module})
    with run_anew(module):
        result = run(pytester, monkeypatch, tests, *names)
    assert result.ret == 0
    assert result.parseoutcomes()["passed"] >= len(names)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.says.replace(" ", "_"))
def test_a_check_that_is_taken_out_makes_its_test_fail(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, mutation: Mutation
) -> None:
    standing = source(importlib.import_module(f"bench.{mutation.module}")).count(mutation.old)
    assert standing == 1, f"{mutation.old!r} stands {standing} times in bench/{mutation.module}.py"
    with run_anew(mutation.module, mutation.old, mutation.new):
        result = run(pytester, monkeypatch, mutation.tests, mutation.noticed_by)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
