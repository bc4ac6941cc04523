"""The arms of a block take turns in which nobody is favoured, and a head that fails is not mistaken for an old base."""

from pathlib import Path
from random import Random
from shutil import copytree, ignore_patterns
from typing import Any

import pytest

from bench.ab import block
from bench.ab.block import BrokenHead, orders
from bench.ab.turns import ARMS, FIRST, SLOW, SLOWED, TURNS, build, pieces, take_turns
from bench.revision import ROOT

OWN_CASES = """
import os, sys
from importlib import import_module
def says(module):
    @contextmanager
    def make():
        import_module(f"dsv3.{module}")
        print("a library that talks on standard output")
        yield lambda: sum(range(20_000))
    return make
CASES = {name: Case(says(name), calls=4) for name in ("always", "newer", "fatal")}
"""
FATAL = 'import os, sys\nprint("out of memory, say", file=sys.stderr, flush=True)\nos._exit(7)\n'


class Arm:
    """A worker whose calls take 1 ms and whose pieces 10 us, or `slower` times that; `log` has what it is asked."""

    def __init__(self, name: str, log: list[str], slower: float = 1.0, fails: str = "") -> None:
        self.name, self.log, self.slower, self.fails = name, log, slower, fails

    def send(self, case: str, pieces: list[int] | None = None) -> None:
        self.pieces = pieces
        self.log.append(f"{self.name}: {case} {pieces}")

    def receive(self) -> Any:
        self.log.append("answered")
        if self.pieces is None:
            return self.fails
        return [1e-3 * self.slower, *(1e-5 * self.slower * count for count in self.pieces)]


def arms(**changed: Any) -> tuple[dict[str, Any], list[str]]:
    """Such workers, and the log of them all."""
    log: list[str] = []
    return {name: Arm(name, log, **changed.get(name, {})) for name in ARMS}, log


def test_all_arms_are_asked_for_the_same_one_at_a_time_in_the_order_of_the_turn() -> None:
    workers, log = arms()
    take_turns(workers, ("a", "b"), orders(5))
    assert log[1::2] == ["answered"] * (len(log) // 2), "an arm is asked when the one before has answered"
    asked = [entry.split(": ") for entry in log[::2]]
    assert [name for name, _ in asked] == [name for order in orders(5) for _ in "ab" for name in order]
    for first in range(0, len(asked), len(ARMS)):
        assert len({request for _, request in asked[first : first + len(ARMS)]}) == 1


def test_each_arm_is_as_often_first_second_and_last_behind_each_other() -> None:
    kept = orders(7)[1:]
    assert len(kept) == TURNS
    for place in range(3):
        assert {arm: sum(order[place] == arm for order in kept) for arm in ARMS} == dict.fromkeys(ARMS, TURNS // 3)


def test_the_first_turn_is_not_kept_and_slow_downs_are_the_controls_calls_and_more() -> None:
    workers, _ = arms(head={"slower": 1.3})
    taken = take_turns(workers, ("a",), orders(0))["a"]
    assert {arm: len(seconds) for arm, seconds in taken.items()} == dict.fromkeys((*ARMS, *SLOWED), TURNS)
    assert taken["head"] == pytest.approx([1.3e-3] * TURNS)
    for name, share in zip(SLOWED, SLOW, strict=True):
        assert taken[name] == pytest.approx([1e-3 * (1 + share)] * TURNS), "sized by the turns before"


def test_slow_downs_are_sized_against_the_base() -> None:
    workers, _ = arms(control={"slower": 2.0})
    taken = take_turns(workers, ("a",), orders(0))["a"]
    added = [more - plain for more, plain in zip(taken["+10%"], taken["control"], strict=True)]
    assert added == pytest.approx([1e-4] * TURNS), "a tenth of the base's millisecond"


def test_pieces_are_what_the_turns_before_make_of_the_share() -> None:
    assert pieces([]) == [FIRST] * len(SLOW)
    assert pieces([(30, 3e-3, 0.1)]) == [50, 50, 100], "a tenth of a millisecond each; the calls take 0.1 s"
    assert pieces([(30, 3e-3, 0.1), (200, 20e-3, 0.1), (200, 20e-3, 9.0)]) == [50, 50, 100], "a spike moves no median"


@pytest.mark.parametrize(
    "failing, unable, broken",
    [
        ([], {}, {}),
        (["head"], {}, {"a": "head: no"}),
        (["base"], {"a": "base: no"}, {}),
        (["control"], {"a": "base: no"}, {}),
        (["base", "head", "control"], {"a": "base: no"}, {}),
    ],
)
def test_the_head_is_named_only_where_the_base_works(
    failing: list[str], unable: dict[str, str], broken: dict[str, str]
) -> None:
    workers, _ = arms(**{arm: {"fails": "no"} for arm in failing})
    assert build(workers, ("a",)) == (unable, broken)


@pytest.fixture
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two trees whose bench has cases of its own, each of which imports a module of dsv3; both have the first."""
    base = tmp_path_factory.mktemp("revision") / "base"
    copytree(ROOT / "bench", base / "bench", ignore=ignore_patterns("__pycache__"))
    with (base / "bench" / "ab" / "cases.py").open("a") as file:
        file.write(OWN_CASES)
    head = base.with_name("head")
    for tree in (base, head):
        write(tree, "__init__", always="")
    return {"base": base, "head": head, "control": base}


def write(tree: Path, *empty: str, **modules: str) -> None:
    """Modules of a tree's dsv3."""
    (tree / "dsv3").mkdir(exist_ok=True, parents=True)
    for name, text in {**dict.fromkeys(empty, ""), **modules}.items():
        (tree / "dsv3" / f"{name}.py").write_text(text)


def test_a_block_measures_each_arms_own_dsv3_and_says_what_the_base_lacks(trees: dict[str, Path]) -> None:
    write(trees["head"], "newer")
    made = block.run(trees, ("newer", "always"), 0, Random(0))
    assert set(made.seconds) == {"always"}
    assert {len(seconds) for seconds in made.seconds["always"].values()} == {TURNS}
    assert made.unable == {"newer": "base: ModuleNotFoundError: No module named 'dsv3.newer'"}
    assert made.took > 0


def test_a_head_that_cannot_do_what_the_base_can_ends_the_run(trees: dict[str, Path]) -> None:
    write(trees["base"], "newer")
    with pytest.raises(BrokenHead, match=r"newer: head: ModuleNotFoundError: No module named 'dsv3.newer'"):
        block.run(trees, ("always", "newer"), 0, Random(0))


def test_a_head_whose_process_ends_is_one_too_with_its_last_words(trees: dict[str, Path]) -> None:
    write(trees["base"], "fatal")
    write(trees["head"], fatal=FATAL)
    with pytest.raises(BrokenHead, match=r"fatal: .*process of head ended with code 7(?s:.*)out of memory, say"):
        block.run(trees, ("fatal", "always"), 0, Random(0))


def test_a_base_whose_process_ends_says_nothing_of_the_head(trees: dict[str, Path]) -> None:
    write(trees["base"], fatal=FATAL)
    write(trees["head"], "fatal")
    with pytest.raises(RuntimeError, match=r"out of memory, say(?s:.*)process of base ended with code 7 at fatal"):
        block.run(trees, ("fatal",), 0, Random(0))


@pytest.mark.slow
def test_a_step_of_two_processes_ends_with_its_forks() -> None:
    made = block.run(dict.fromkeys(ARMS, ROOT), ("step_two_processes",), 0, Random(0))
    assert all(taken > 0 for seconds in made.seconds["step_two_processes"].values() for taken in seconds)
