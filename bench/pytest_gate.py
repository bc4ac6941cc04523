"""A gate for any PyTorch step, as a pytest fixture: exact figures against expectations that your repository keeps.

    pytest_plugins = ["bench.pytest_gate"]      # in your conftest.py, once; no entry point, which would have pytest
                                                # rewrite the asserts of this whole project

    def test_step(gate):
        model, optimizer, batch = ...
        def step():
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        gate(step)

The step is called five times at one thread. Held are torch's operators by name, the waits of the host, FLOPs,
allocations and peak bytes: what a CPU repeats exactly, so that one tensor more is seen whatever the load. They stand
in `gate/<file>-<test>.json` beside the test file, by versions of torch and Python and by processor. A test of several
steps gives each a name, `gate(step, name="forward")`, in which the file's name then ends.

    pytest --gate-accept "why"     write what is found as the new expectation
    pytest --gate-require          fail where this machine has no expectation yet, instead of skipping

A test fails that costs more, and one that costs less: either the saving is real and the next loss of it must be
noticed, or something is no longer measured. Exit code of a run in which nothing else failed: 10 if something costs
more, 11 if things only cost less, 12 if there was no expectation for some step. Under pytest-xdist too: what the gate
found travels with each test's report.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

Step = Callable[[], object]


class Gate(Protocol):
    """The fixture: fails the test unless the step costs exactly what is expected under this name."""

    def __call__(self, step: Step, name: str = "") -> None:
        """Measure and judge."""


EQUAL, DEARER, CHEAPER, UNKNOWN = 0, 10, 11, 12
_VERDICT = "dsv3 gate"  # the property of a test's report under which what was found travels


def pytest_addoption(parser: pytest.Parser) -> None:
    """How to treat what is not as expected."""
    group = parser.getgroup("gate", "exact costs of a training step")
    group.addoption("--gate-accept", metavar="REASON", default="", help="write what is found as the expectation")
    group.addoption("--gate-require", action="store_true", help="fail where this machine has no expectation")


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Gate:
    """Call it with a step; it fails the test unless the step costs exactly what is expected."""
    taken: set[str] = set()

    def check(step: Step, name: str = "") -> None:
        if name in taken:
            rule = "stands for another step of this test, and the two would share one file of expectations"
            raise ValueError(f'name={name!r}: {rule}; give each step its own, as gate(step, name="forward")')
        taken.add(name)
        verdict, said = judge(_path(request, name), _place(), _measure(step), request.config.getoption("--gate-accept"))
        request.node.user_properties.append((_VERDICT, verdict))
        if verdict == UNKNOWN and not request.config.getoption("--gate-require"):
            pytest.skip(said)
        if verdict:
            pytest.fail(said, pytrace=False)

    return check


def _path(request: pytest.FixtureRequest, name: str) -> Path:
    test = request.node.nodeid.partition("::")[2]  # with its class and its parameters
    words = re.sub(r"[^\w.]+", "-", f"{request.path.stem}-{test}-{name}").strip("-")
    return Path(request.path.parent, "gate", f"{words}.json")


def _place() -> str:
    from bench.gate import place

    return place()


def _measure(step: Step) -> dict[str, Any]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from bench.structure import work

    found, _ = work(lambda: None, lambda _: step())
    del found["live_bytes"]  # what was built before the step is not seen, and depends on which tests ran
    return found


def judge(path: Path, here: str, found: dict[str, Any], reason: str) -> tuple[int, str]:
    """EQUAL or the exit code that the figures ask for, and what there is to say; with a reason they are accepted."""
    from bench.differences import differences
    from bench.expectations import write

    stored = json.loads(path.read_text()) if path.exists() else {}
    if reason:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {**stored, here: {"reason": reason, "figures": found}})
        return EQUAL, ""
    if here not in stored:
        return UNKNOWN, f'no expectation for {here} in {path}; to add it: pytest --gate-accept "why"'
    changes = list(differences(stored[here]["figures"], found))
    if not changes:
        return EQUAL, ""
    lines = [*map(str, changes), 'if that is meant: pytest --gate-accept "why"']
    return DEARER if any(change.dearer for change in changes) else CHEAPER, "\n".join(lines)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Say with the exit code what the gate found, where nothing else failed."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist: the process that it reports to has one
        return
    found = {verdict for reports in reporter.stats.values() for report in reports for verdict in _verdicts(report)}
    failed = reporter.stats.get("failed", []) + reporter.stats.get("error", [])
    others_failed = any(report.when != "call" or not _verdicts(report) for report in failed)
    if found and not others_failed and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        session.exitstatus = min(found)


def _verdicts(report: Any) -> set[int]:
    """What the gate found in a test but equal figures."""
    properties = getattr(report, "user_properties", ())
    return {verdict for name, verdict in properties if name == _VERDICT and verdict != EQUAL}
