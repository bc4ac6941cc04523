"""A worker answers every request, times what it is told to, and its slow-downs are real work."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from shutil import copytree, ignore_patterns
from typing import Any

import pytest

from bench.ab import block, worker
from bench.ab.cases import CASES, Call, Case
from bench.meters.paired import threads
from bench.revision import ROOT

TINY = """
from contextlib import contextmanager
@contextmanager
def tiny():
    print("a library that talks on standard output")
    yield lambda: sum(range(20_000))
@contextmanager
def dies():
    import os, sys
    print("out of memory, say", file=sys.stderr, flush=True)
    os._exit(7)
    yield
@contextmanager
def lacks():
    from dsv3 import something_newer
    yield
CASES = {"tiny": Case(tiny), "dies": Case(dies), "lacks": Case(lacks)}
"""


def answers(monkeypatch: pytest.MonkeyPatch, cases: dict[str, Case], *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What a worker in this process answers."""
    monkeypatch.setattr(worker, "CASES", cases)
    said = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), said)
    return [json.loads(line) for line in said.getvalue().splitlines()]


@contextmanager
def counted(calls: list[float]) -> Iterator[Call]:
    """A case of two milliseconds that writes down when it was called."""

    def call() -> None:
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass
        calls.append(end)

    yield call
    calls.append(0.0)


def test_a_case_is_built_warmed_up_called_as_often_as_asked_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    built, timed = answers(monkeypatch, {"a": Case(lambda: counted(calls))}, {"build": "a"}, {"case": "a", "calls": 5})
    assert built == {}
    assert len(timed["seconds"]) == 5
    assert all(0.002 <= taken < 0.1 for taken in timed["seconds"])
    assert len(calls) == worker.WARM_UP + 5 + 1
    assert calls[-1] == 0.0, "the case was left at the end"


@pytest.mark.parametrize("error", [ImportError("no name 'Fixed'"), TypeError("unexpected keyword"), ValueError("rule")])
def test_a_case_that_cannot_be_served_says_why_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails() -> Any:
        raise error

    cases = {"old": Case(fails), "a": Case(lambda: counted([]))}
    first, second, third = answers(monkeypatch, cases, {"build": "old"}, {"build": "a"}, {"case": "a", "calls": 1})
    assert first == {"error": f"{type(error).__name__}: {error}"}
    assert second == {}
    assert len(third["seconds"]) == 1


def test_slow_downs_are_work_of_about_the_share_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"a": Case(lambda: counted([]))}
    with threads(1):
        built, timed = answers(monkeypatch, cases, {"build": "a", "slow": [0.1, 0.5]}, {"case": "a", "calls": 20})
    assert built == {}
    rows = timed["seconds"]
    assert all(plain < tenth < half for plain, tenth, half in rows)
    middle = sorted(half / plain for plain, _, half in rows)[10]
    assert 1.2 < middle < 2.0, "half more work, on a machine that does other things too"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose bench has three cases of its own."""
    made = tmp_path_factory.mktemp("revision") / "tree"
    for room in ("dsv3", "bench"):
        copytree(ROOT / room, made / room, ignore=ignore_patterns("__pycache__"))
    with (made / "bench" / "ab" / "cases.py").open("a") as file:
        file.write(TINY)
    return made


@pytest.mark.slow
def test_a_block_times_each_arm_in_a_process_of_its_own_and_says_what_one_lacks(tree: Path) -> None:
    made = block.run(dict.fromkeys(block.ARMS, tree), ("lacks", "tiny"), 0, Random(0))
    assert set(made.seconds) == {"tiny"}
    calls = block.ROUNDS * block.CALLS
    assert {arm: len(seconds) for arm, seconds in made.seconds["tiny"].items()} == dict.fromkeys(
        (*block.ARMS, *block.SLOWED), calls
    )
    assert made.unable["lacks"].startswith("base: ImportError: cannot import name 'something_newer'")
    assert made.took > 0


def test_a_process_that_ends_is_reported_with_its_last_words(tree: Path) -> None:
    with block.worker("head", tree, Random(0)) as process:
        process.send(build="dies")
        with pytest.raises(RuntimeError, match=r"process of head ended with code 7: (?s:.*)out of memory, say"):
            process.receive()


def test_every_case_of_the_gate_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, case in CASES.items() if case.clock == "cpu"]
    requests = [request for name in names for request in ({"build": name}, {"case": name, "calls": 1})]
    with threads(1):
        said = answers(monkeypatch, dict(CASES), *requests)
    assert said[::2] == [{}] * len(names)
    assert all(answer["seconds"][0] > 0 for answer in said[1::2])


@pytest.mark.slow
def test_a_step_of_two_processes_ends_with_its_fork(tree: Path) -> None:
    original = dict.fromkeys(block.ARMS, ROOT)
    with block.worker("base", original["base"], Random(0)) as process:
        process.send(build="step_two_processes")
        assert process.receive() == {}
        process.send(case="step_two_processes", calls=2)
        assert all(taken > 0 for taken in process.receive()["seconds"])
