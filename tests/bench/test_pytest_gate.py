"""The gate's fixture in somebody else's repository, on a model that is not ours."""

import json
from typing import Any

import pytest
import torch

import bench.structure  # noqa: F401  imported inside the run, it would be forgotten at its end
from bench.gate import place

pytest_plugins = ["pytester"]

STEP = """
import torch

torch.manual_seed(0)
model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = torch.randn(2, 4, 16)

def step():
    {more}
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

def test_step(gate):
    gate(step)

def test_other():
    assert {other}
"""


TWICE = """
def test_both(gate):
    gate(step{first})
    gate(step{second})
"""

BROKEN_AFTER = """
import pytest

@pytest.fixture
def torn():
    yield
    assert False

def test_torn(gate, torn):
    gate(step)
"""


def theirs(
    pytester: pytest.Pytester, *options: str, more: str = "pass", other: str = "True", tests: str = ""
) -> pytest.RunResult:
    pytester.makepyfile(test_theirs=STEP.format(more=more, other=other) + tests)
    return pytester.runpytest_inprocess("-p", "bench.pytest_gate", "-p", "no:cacheprovider", *options)


def stored(pytester: pytest.Pytester, name: str = "test_theirs-test_step") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pytester.path / "gate" / f"{name}.json").read_text())
    return found


def test_a_step_is_accepted_once_and_then_held_both_ways(pytester: pytest.Pytester) -> None:
    unknown = theirs(pytester)
    assert unknown.ret == 12
    unknown.assert_outcomes(skipped=1, passed=1)
    theirs(pytester, "--gate-require").assert_outcomes(failed=1, passed=1)

    assert theirs(pytester, "--gate-accept", "first", more="torch.empty(3)").ret == 0
    (entry,) = stored(pytester).values()
    assert entry["reason"] == "first"
    assert entry["figures"]["operators"]["aten.empty.memory_format"] >= 1

    assert theirs(pytester, more="torch.empty(3)").ret == 0
    dearer = theirs(pytester, more="torch.empty(3), torch.empty(0)")
    assert dearer.ret == 10
    dearer.stdout.fnmatch_lines(["*operators.aten.empty.memory_format: expected*"])
    assert theirs(pytester, more="pass").ret == 11


def test_another_failure_keeps_its_exit_code(pytester: pytest.Pytester) -> None:
    assert theirs(pytester, "--gate-accept", "first", other="False").ret == pytest.ExitCode.TESTS_FAILED
    dearer = theirs(pytester, more="torch.empty(0)", other="False")
    assert dearer.ret == pytest.ExitCode.TESTS_FAILED
    dearer.assert_outcomes(failed=2)


def test_a_failure_after_a_gated_test_keeps_its_exit_code(pytester: pytest.Pytester) -> None:
    assert theirs(pytester, "--gate-accept", "first", tests=BROKEN_AFTER).ret == pytest.ExitCode.TESTS_FAILED
    dearer = theirs(pytester, more="torch.empty(0)", tests=BROKEN_AFTER)
    assert dearer.ret == pytest.ExitCode.TESTS_FAILED
    dearer.assert_outcomes(failed=2, passed=1, errors=1)


def test_an_expectation_of_another_machine_is_kept(pytester: pytest.Pytester) -> None:
    theirs(pytester, "--gate-accept", "first")
    (entry,) = stored(pytester).values()
    (pytester.path / "gate" / "test_theirs-test_step.json").write_text(json.dumps({"another machine": entry}))
    unknown = theirs(pytester, "-rs")
    assert unknown.ret == 12
    unknown.stdout.fnmatch_lines([f"*no expectation for {place()} in *"])
    assert theirs(pytester, "--gate-accept", "second").ret == 0
    assert stored(pytester).keys() == {"another machine", place()}


def test_what_was_built_before_the_step_is_not_held(pytester: pytest.Pytester) -> None:
    theirs(pytester, "--gate-accept", "first")
    (entry,) = stored(pytester).values()
    held = {"peak_bytes", "allocations", "flops", "operators", "host_synchronisations"}
    assert entry["figures"].keys() == held


def test_two_steps_of_a_test_need_names_and_then_have_a_file_each(pytester: pytest.Pytester) -> None:
    unnamed = theirs(pytester, "--gate-accept", "first", tests=TWICE.format(first="", second=""))
    assert unnamed.ret == pytest.ExitCode.TESTS_FAILED
    unnamed.stdout.fnmatch_lines(["*ValueError: name='': stands for another step of this test*"])
    named = TWICE.format(first=', name="one"', second=', name="two"')
    assert theirs(pytester, "--gate-accept", "first", tests=named).ret == 0
    assert stored(pytester, "test_theirs-test_both-one") == stored(pytester, "test_theirs-test_both-two")
    assert theirs(pytester, tests=named).ret == 0


@pytest.mark.slow
def test_exit_codes_come_through_several_workers(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs=STEP.format(more="pass", other="True"))
    two = ("-p", "bench.pytest_gate", "-p", "no:cacheprovider", "-n", "2")
    assert pytester.runpytest_subprocess(*two).ret == 12
    theirs(pytester, "--gate-accept", "first").assert_outcomes(passed=2)
    pytester.makepyfile(test_theirs=STEP.format(more="torch.empty(0)", other="True"))
    assert pytester.runpytest_subprocess(*two).ret == 10


def test_the_step_runs_at_one_thread(pytester: pytest.Pytester) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        more = "assert torch.get_num_threads() == 1"
        theirs(pytester, "--gate-accept", "first", more=more).assert_outcomes(passed=2)
    finally:
        torch.set_num_threads(before)
