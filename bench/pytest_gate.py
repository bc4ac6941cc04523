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
allocations and peak bytes: what a CPU repeats exactly, so that one tensor more is seen whatever the load. They stand in
`gate/<file>-<test>.json` beside the test file, by versions of torch and Python and by processor.

    pytest --gate-accept "why"     write what is found as the new expectation
    pytest --gate-require          fail where this machine has no expectation yet, instead of skipping

A test fails that costs more, and one that costs less: either the saving is real and the next loss of it must be
noticed, or something is no longer measured. Exit code of a run in which nothing else failed: 10 if something costs
more, 11 if things only cost less, 12 if there was no expectation for some step.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Step = Callable[[], object]

DEARER, CHEAPER, UNKNOWN = 10, 11, 12
_VERDICTS = pytest.StashKey[set[int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How to treat what is not as expected."""
    group = parser.getgroup("gate", "exact costs of a training step")
    group.addoption("--gate-accept", metavar="REASON", default="", help="write what is found as the expectation")
    group.addoption("--gate-require", action="store_true", help="fail where this machine has no expectation")


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Callable[[Step], None]:
    """Call it with a step; it fails the test unless the step costs exactly what is expected."""
    test = request.node.nodeid.partition("::")[2]  # with its class and its parameters
    name = re.sub(r"[^\w.]+", "-", f"{request.path.stem}-{test}").strip("-")
    path = request.path.parent / "gate" / f"{name}.json"

    def check(step: Step) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from bench.gate import key
        from bench.structure import work

        found, _ = work(lambda: None, lambda _: step())
        del found["live_bytes"]  # what was built before the step is not seen, and depends on which tests ran
        verdict, said = judge(path, key(), found, request.config.getoption("--gate-accept"))
        request.config.stash.setdefault(_VERDICTS, set()).add(verdict)
        if verdict == UNKNOWN and not request.config.getoption("--gate-require"):
            pytest.skip(said)
        if verdict:
            pytest.fail(said, pytrace=False)

    return check


def judge(path: Path, here: str, found: dict[str, Any], reason: str) -> tuple[int, str]:
    """0 or the exit code that the figures ask for, and what there is to say; with a reason they are accepted."""
    from bench.gate import differences, write

    stored = json.loads(path.read_text()) if path.exists() else {}
    if reason:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {**stored, here: {"reason": reason, "figures": found}})
        return 0, ""
    if here not in stored:
        return UNKNOWN, f'no expectation for {here} in {path}; to add it: pytest --gate-accept "why"'
    changes = list(differences(stored[here]["figures"], found))
    if not changes:
        return 0, ""
    lines = [*map(str, changes), 'if that is meant: pytest --gate-accept "why"']
    return DEARER if any(change.dearer for change in changes) else CHEAPER, "\n".join(lines)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Say with the exit code what the gate found, where nothing else failed."""
    verdicts = session.config.stash.get(_VERDICTS, set()) - {0}
    gated = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if verdicts and session.exitstatus in gated and not _others_failed(session):
        session.exitstatus = min(verdicts)


def _others_failed(session: pytest.Session) -> bool:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return True
    failed = reporter.stats.get("failed", []) + reporter.stats.get("error", [])
    return any("pytest --gate-accept" not in str(report.longrepr) for report in failed)
