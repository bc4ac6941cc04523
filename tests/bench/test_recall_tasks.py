"""Tasks of recall: a solver by brute force, which sees a row up to its question, finds every answer."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.recall_tasks import (
    ASK,
    KEYS,
    LENGTHS,
    MARK,
    NO_LABEL,
    NOISE,
    ROWS,
    SYMBOLS,
    VALUES,
    VOCABULARY,
    Batch,
    Task,
    batch,
)

BESIDES_COUNTING = tuple(name for name in ROWS if name != "counting")
seeds = st.integers(0, 2**31)
names = st.sampled_from(tuple(ROWS))


def solve(name: str, past: list[int]) -> set[int]:
    """The answers that the tokens up to a question allow, the question being the last of them."""
    *told, asked = past
    if name == "counting":
        (first, most), (_, second) = Counter(token for token in told if token in SYMBOLS).most_common(2)
        return {first} if most > second else set()
    if name in ("needle", "tracking"):
        triples = zip(told, told[1:], told[2:], strict=False)
        return {last for mark, key, last in triples if mark == MARK and key == asked}
    following = {after for token, after in pairwise(told) if token == asked}
    return following if name == "induction" else following & set(VALUES)


def questions(rows: Batch) -> list[tuple[list[int], int]]:
    """Each label with its row up to the question."""
    asked = zip(*np.nonzero(rows.labels != NO_LABEL), strict=True)
    return [(rows.tokens[row, : at + 1].tolist(), int(rows.labels[row, at])) for row, at in asked]


@given(name=names, length=st.sampled_from(LENGTHS), seed=seeds, block=st.sampled_from([2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_every_answer_follows_from_the_tokens_before_it(name: str, length: int, seed: int, block: int) -> None:
    rows = batch(Task(name=name, length=length, block=block), 2, seed=seed, step=0)
    found = questions(rows)
    assert found or name == "counting", "only where no symbol leads far enough is nothing asked"
    for past, label in found[:: max(1, len(found) // 50)]:
        assert solve(name, past) == {label}


@given(name=st.sampled_from(BESIDES_COUNTING), length=st.sampled_from(LENGTHS), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_without_the_half_that_tells_nothing_gives_an_answer_away(name: str, length: int, seed: int) -> None:
    task = Task(name=name, length=length, block=4)
    rows = batch(task, 2, seed=seed, step=0)
    assert set(rows.tokens[:, task.telling.stop : task.asking.start].flatten().tolist()) <= set(NOISE)
    rows.tokens[:, : task.telling.stop] = NOISE[0]
    for past, _ in questions(rows):
        assert len(past) > task.asking.start
        assert solve(name, past) == set()


@pytest.mark.parametrize("name", ROWS)
def test_the_key_of_a_batch_decides_it_and_no_split_has_a_row_of_another(name: str) -> None:
    task = Task(name=name, length=256, block=4)

    def rows(**key: int | str) -> np.ndarray:
        return batch(task, 4, **{"seed": 3, "step": 5, "split": "train"} | key).tokens  # type: ignore[arg-type]

    assert np.array_equal(rows(), rows())
    others = [rows(split="held_out"), rows(split="validation"), rows(seed=4)]
    others += [rows(step=step) for step in range(20) if step != 5]
    every = np.concatenate([rows(), *others])
    assert len(np.unique(every, axis=0)) == len(every)


@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_labels_are_of_the_vocabulary_and_what_is_asked_is_not_the_answer(name: str) -> None:
    rows = batch(Task(name=name), 4, seed=0, step=0)
    assert rows.tokens.shape == rows.labels.shape == (4, 1024)
    assert rows.tokens.min() >= 0
    asked = rows.labels != NO_LABEL
    assert asked.any(axis=1).all()
    assert max(rows.tokens.max(), rows.labels.max()) < VOCABULARY
    assert set(rows.labels[asked].tolist()).isdisjoint(NOISE)
    assert (rows.tokens[asked] != rows.labels[asked]).all()


@given(seed=seeds, block=st.sampled_from([2, 4, 8, 16, 32]))
@settings(max_examples=20, deadline=None)
def test_a_border_lies_between_key_and_value(seed: int, block: int) -> None:
    task = Task(name="straddle", length=512, block=block)
    told = batch(task, 1, seed=seed, step=0).tokens[0, : task.telling.stop]
    keys = np.nonzero(np.isin(told, KEYS))[0]
    assert len(keys) == min((task.telling.stop - 1) // block, 32)
    assert ((keys + 1) % block == 0).all()
    assert np.isin(told[keys + 1], VALUES).all()


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_tracking_asks_for_two_to_four_hops_that_end_at_a_value(seed: int) -> None:
    rows = batch(Task(name="tracking", length=512), 1, seed=seed, step=0)
    tokens, labels = rows.tokens[0].tolist(), rows.labels[0].tolist()
    asked = [at for at, token in enumerate(tokens) if token == ASK]
    assert len(asked) == 8
    for at in asked:
        hops = next(n for n in range(9) if labels[at + 1 + n] == NO_LABEL)
        assert 2 <= hops <= 4
        assert [label in VALUES for label in labels[at + 1 : at + 1 + hops]] == [False] * (hops - 1) + [True]


@pytest.mark.parametrize(
    "wrong, named", [({"name": "recal"}, "name"), ({"length": 2048}, "length"), ({"block": 3}, "block")]
)
def test_a_task_that_does_not_exist_is_refused(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}="):
        Task(**{"name": "recall"} | wrong)
