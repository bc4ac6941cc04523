"""The gate's fixture in somebody else's repository, on a model that is not ours."""

import json

import pytest
import torch

import bench.structure  # noqa: F401  imported inside the run, it would be forgotten at its end

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


def theirs(pytester: pytest.Pytester, *options: str, more: str = "pass", other: str = "True") -> pytest.RunResult:
    pytester.makepyfile(test_theirs=STEP.format(more=more, other=other))
    return pytester.runpytest_inprocess("-p", "bench.pytest_gate", "-p", "no:cacheprovider", *options)


def test_a_step_is_accepted_once_and_then_held_both_ways(pytester: pytest.Pytester) -> None:
    unknown = theirs(pytester)
    assert unknown.ret == 12
    unknown.assert_outcomes(skipped=1, passed=1)
    theirs(pytester, "--gate-require").assert_outcomes(failed=1, passed=1)

    assert theirs(pytester, "--gate-accept", "first", more="torch.empty(3)").ret == 0
    (stored,) = json.loads((pytester.path / "gate" / "test_theirs-test_step.json").read_text()).values()
    assert stored["reason"] == "first"
    assert stored["figures"]["operators"]["aten.empty.memory_format"] >= 1

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


def test_the_step_runs_at_one_thread(pytester: pytest.Pytester) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        more = "assert torch.get_num_threads() == 1"
        theirs(pytester, "--gate-accept", "first", more=more).assert_outcomes(passed=2)
    finally:
        torch.set_num_threads(before)
