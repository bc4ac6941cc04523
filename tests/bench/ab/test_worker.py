"""A worker answers every request, times what it is told to, and its extra work is real and comes last."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.ab import worker
from bench.ab.cases import CASES, Call, Case
from bench.meters.paired import threads


class Requests:
    """A worker's end of a pipe whose other end has asked everything."""

    def __init__(self, *asked: Any) -> None:
        self.asked, self.answers = list(asked), list[Any]()

    def recv(self) -> Any:
        if not self.asked:
            raise EOFError
        return self.asked.pop(0)

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


def answers(monkeypatch: pytest.MonkeyPatch, cases: dict[str, Case], *asked: Any) -> list[Any]:
    """What a worker in this process answers."""
    monkeypatch.setattr(worker, "CASES", cases)
    monkeypatch.setattr(sys, "path", [*sys.path])
    requests: Any = Requests(*asked)
    with threads(1):
        worker.serve("tree", requests)
    found: list[Any] = requests.answers
    return found


def case(make: Callable[[], Any], calls: int = 5) -> Case:
    return Case(make, calls=calls)


@contextmanager
def counted(calls: list[str]) -> Iterator[Call]:
    """A case of two milliseconds that writes down that it was called."""

    def call() -> None:
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass
        calls.append("call")

    yield call
    calls.append("left")


def test_a_case_is_built_warmed_up_called_as_often_as_it_says_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    built, seconds = answers(monkeypatch, {"a": case(lambda: counted(calls))}, ("a", None), ("a", []), None)
    assert built == ""
    assert len(seconds) == 1
    assert 5 * 0.002 <= seconds[0] < 0.5
    assert calls == ["call"] * (worker.WARM_UP + 5) + ["left"]


def test_a_worker_whose_block_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(monkeypatch, {"a": case(lambda: counted([]))}, ("a", None)) == [""]


def test_the_extra_work_comes_after_all_calls_of_the_turn_and_is_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(worker, "work", lambda pieces: done.append(f"{pieces} pieces"))
    turn = ("a", [3, 4])
    _, seconds, again = answers(monkeypatch, {"a": case(lambda: counted(done), 2)}, ("a", None), turn, turn, None)
    assert done == ["call"] * worker.WARM_UP + 2 * ["call", "call", "3 pieces", "4 pieces"] + ["left"]
    for calls, *extra in (seconds, again):
        assert calls >= 2 * 0.002
        assert len(extra) == 2
        assert all(0 <= taken < 0.002 for taken in extra), "nothing was done"


def test_extra_work_takes_time_in_proportion() -> None:
    with threads(1):
        worker.work(100)
        taken = {}
        for pieces in (200, 2000):
            start = time.process_time()
            worker.work(pieces)
            taken[pieces] = time.process_time() - start
    assert 3 < taken[2000] / taken[200] < 30, "ten times the work, on a machine that does other things too"


@pytest.mark.parametrize("error", [ImportError("no name 'Fixed'"), TypeError("unexpected keyword"), ValueError("rule")])
def test_a_case_that_cannot_be_served_says_why_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails() -> Any:
        raise error

    cases = {"old": case(fails), "a": case(lambda: counted([]))}
    first, second, third = answers(monkeypatch, cases, ("old", None), ("a", None), ("a", []))
    assert first == f"{type(error).__name__}: {error}"
    assert second == ""
    assert len(third) == 1


def test_every_case_of_the_gate_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, case in CASES.items() if case.clock == "cpu"]
    said = answers(monkeypatch, dict(CASES), *(asked for name in names for asked in ((name, None), (name, [1]))))
    assert said[::2] == [""] * len(names)
    assert all(seconds > 0 for taken in said[1::2] for seconds in taken)
