"""What a run says as a whole: its exit code, its own error rates, and silence when its control fails."""

from random import Random

import pytest

from bench.ab.block import Block
from bench.ab.decide import Rate
from bench.ab.judge import FASTER, SAME, SLOWER, UNKNOWN, WITHDRAWN, judge
from bench.ab.turns import ARMS, SLOW, SLOWED

ADDED = dict(zip(SLOWED, SLOW, strict=True))


def blocks(count: int, cases: dict[str, float], *, control: float = 1.0, spread: float = 0.005) -> list[Block]:
    """Blocks of a head that takes so many times as long per case; the base's calls take a millisecond."""
    random = Random(0)

    def block() -> Block:
        seconds = {}
        for case, slower in cases.items():
            factor = dict.fromkeys(ARMS, 1.0) | {"head": slower, "control": control}
            arms = {arm: 0.001 * factor[arm] * random.lognormvariate(0.0, spread) for arm in ARMS}
            arms |= {slow: arms["control"] * (1 + share) for slow, share in ADDED.items()}
            seconds[case] = {arm: [taken] * 12 for arm, taken in arms.items()}
        return Block(seconds=seconds, unable={}, took=10.0, load=1.0)

    return [block() for _ in range(count)]


@pytest.mark.parametrize(
    "cases, count, code",
    [
        ({"a": 1.0, "b": 1.0}, 12, SAME),
        ({"a": 1.1, "b": 1.0}, 12, SLOWER),
        ({"a": 1.1, "b": 0.8}, 12, SLOWER),
        ({"a": 0.8, "b": 1.0}, 12, FASTER),
        ({"a": 1.1, "b": 1.0}, 3, UNKNOWN),
        ({}, 1, UNKNOWN),
    ],
)
def test_the_exit_code_says_the_worst_that_was_found(cases: dict[str, float], count: int, code: int) -> None:
    assert judge(blocks(count, cases)).code == code


def test_a_base_that_differs_from_itself_withdraws_every_verdict() -> None:
    judgement = judge(blocks(12, {"a": 1.3, "b": 1.0}, control=1.1))
    assert judgement.withdrawn
    assert judgement.code == WITHDRAWN
    assert judgement.alarms == Rate(2, 2)


def test_a_run_says_how_often_it_finds_its_own_slow_downs() -> None:
    judgement = judge(blocks(12, {"a": 1.0, "b": 1.0}))
    assert judgement.alarms == Rate(0, 2)
    assert [rate for _, rate in judgement.power.values()] == [Rate(2, 2)] * 3
    assert [more for more, _ in judgement.power.values()] == pytest.approx([0.05, 0.1, 0.2])
    few = judge(blocks(4, {"a": 1.0, "b": 1.0}))
    assert [rate for _, rate in few.power.values()] == [Rate(0, 2)] * 3, "four blocks support nothing"


def test_a_case_that_one_side_lacks_is_apart_from_the_verdicts() -> None:
    made = [
        Block(seconds=block.seconds, unable={"old": "base: ImportError: no"}, took=1.0, load=1.0)
        for block in blocks(12, {"a": 1.0})
    ]
    judgement = judge(made)
    assert set(judgement.cases) == {"a"}
    assert judgement.unable == {"old": "base: ImportError: no"}
    assert judgement.code == SAME
