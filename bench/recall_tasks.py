"""Synthetic tasks that ask for what a row said long before, each answer derivable from the tokens up to its question.

    recall      pairs of a key and a value, then keys: which value?  (multi-query associative recall, arXiv 2312.04927)
    needle      few marked pairs in a hay of pairs without a mark  (multi-key needle of RULER, arXiv 2404.06654)
    straddle    recall with a block's border between a key and its value: a block's summary shows one of the two
    counting    runs of symbols: which was the most frequent so far?  (after RULER's frequent words)
    tracking    x = 7; y = x; z = y: what is z? 2 to 4 hops, each written out  (after RULER's variable tracking)
    induction   pieces of text, then the same pieces in another order: what comes next?  (arXiv 2209.11895)

The first half of a row tells, the third quarter is noise, the last quarter asks: who looks back by less than a quarter
has to guess. Only counting tells all along. Below, `.` is noise, `_` a position without a label, `|` the border of a
block; a label stands under the token that asks, and is the token to be said there:

    recall      tokens  . k v . q w . .     . . k q k .         needle      tokens  k u . ! k v . .     . . k . . .
                labels  _ _ _ _ _ _ _ _     _ _ v w v _                     labels  _ _ _ _ _ _ _ _     _ _ v _ _ _

    straddle    tokens  . . k | v . q | w   . . k q k .         counting    tokens  a a b b a a c c     b b ? a a ?
                labels  _ _ _   _ _ _   _   _ _ v w v _                     labels  _ _ _ _ _ _ _ _     _ _ _ _ _ a

    tracking    tokens  = x 7 . = y x .     . ? y x 7 .         induction   tokens  b a d . c e f .     c e f b a d
                labels  _ _ _ _ _ _ _ _     _ _ x 7 _ _                     labels  _ _ _ _ _ _ _ _     e f _ a d _

A batch is decided by (task, seed, step) and the split, which together are the key of its random stream. No torch here,
so that a study may name the tasks without importing it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
from jaxtyping import Int

from dsv3.config.rules import require, require_one_of

NO_LABEL = -100
MARK, ASK = 0, 1
NOISE, KEYS, VALUES = range(2, 64), range(64, 128), range(128, 192)
VOCABULARY = 192
SYMBOLS = range(64, 72)  # of counting, in runs of RUN; one of them is FAVOURED times as likely as each other
RUN, FAVOURED = 8, 1.8
LEAD = 1 / 40  # of the row, by which the most frequent symbol must lead to be asked for
PIECE = 16  # tokens of a piece of text of induction
LENGTHS = (64, 128, 256, 512, 1024)  # beyond, recall would need more keys than there are

Numbers = np.ndarray
Split = Literal["train", "validation", "held_out"]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and at each position the token to be said there, or NO_LABEL."""

    tokens: Int[Numbers, "B T"]
    labels: Int[Numbers, "B T"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the tasks, in rows of `length` tokens; `block` is where `straddle` has its borders."""

    name: str
    length: int = 1024
    block: int = 16

    def __post_init__(self) -> None:
        require_one_of(self, "name", tuple(ROWS))
        known = ", ".join(map(str, LENGTHS))
        require(self.length in LENGTHS, "length", self.length, f"must be one of {known}", "pick one of these")
        rule = f"must be a power of two and at most an eighth of length={self.length}"
        fits = self.block in (1, 2, 4, 8, 16, 32, 64, 128) and self.block <= self.length // 8
        require(fits, "block", self.block, rule, "use the block of the selection")

    @property
    def telling(self) -> range:
        """Positions of the half that tells, but for its last 32nd: see `asking`."""
        return range(self.length // 2 - self.length // 64)

    @property
    def asking(self) -> range:
        """Positions of the quarter that asks, which begins behind telling by more than a quarter of the row."""
        return range(self.length * 3 // 4, self.length)


def batch(task: Task, rows: int, *, seed: int, step: int, split: Split = "train") -> Batch:
    """The rows of a step."""
    key = sha256(f"{seed}/{split}/{task.name}/{step}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(key[:16], "little"))
    made = [ROWS[task.name](task, random) for _ in range(rows)]
    tokens, labels = zip(*made, strict=True)
    return Batch(np.stack(tokens), np.stack(labels))


def _recall(task: Task, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    tokens, labels = _nothing(task, random)
    pairs = _pairs(random, task.length // 16)
    _scatter(random, tokens, task.telling, pairs)
    _ask_each(task, random, tokens, labels, pairs)
    return tokens, labels


def _needle(task: Task, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    tokens, labels = _nothing(task, random)
    number = max(2, task.length // 64)
    pairs = _pairs(random, number)
    hay = np.stack((random.choice(KEYS, 2 * number), random.choice(VALUES, 2 * number)), axis=1)
    texts = [np.array((MARK, *pair)) for pair in pairs] + list(hay)
    _scatter(random, tokens, task.telling, [texts[at] for at in random.permutation(len(texts))])
    _ask_each(task, random, tokens, labels, pairs)
    return tokens, labels


def _straddle(task: Task, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    tokens, labels = _nothing(task, random)
    borders = np.array(task.telling[task.block :: task.block])
    borders = np.sort(random.choice(borders, min(len(borders), task.length // 16), replace=False))
    pairs = _pairs(random, len(borders))
    tokens[borders - 1], tokens[borders] = pairs.T
    _ask_each(task, random, tokens, labels, pairs)
    return tokens, labels


def _counting(task: Task, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    weight = np.ones(len(SYMBOLS))
    weight[random.integers(len(SYMBOLS))] = FAVOURED
    tokens = np.repeat(random.choice(SYMBOLS, task.length // RUN, p=weight / weight.sum()), RUN)
    labels = np.full(task.length, NO_LABEL)
    questions = np.array(task.asking[RUN - 1 :: RUN])
    tokens[questions] = ASK
    for place in questions:
        counts = np.bincount(tokens[:place], minlength=SYMBOLS.stop)[SYMBOLS.start : SYMBOLS.stop]
        second, first = np.sort(counts)[-2:]
        if first - second >= LEAD * task.length:
            labels[place] = SYMBOLS[int(counts.argmax())]
    return tokens, labels


def _tracking(task: Task, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    tokens, labels = _nothing(task, random)
    number = max(2, task.length // 64)
    hops = random.integers(2, 5, number)
    names = np.split(random.choice(KEYS, hops.sum(), replace=False), hops.cumsum()[:-1])
    chains = [(random.choice(VALUES), *chain) for chain in names]
    said = [0] * number
    statements = []
    for at in random.permutation(np.repeat(np.arange(number), hops)):
        source, name = chains[at][said[at] : said[at] + 2]
        statements.append(np.array((MARK, name, source)))
        said[at] += 1
    _scatter(random, tokens, task.telling, statements)
    answers = [np.array((ASK, *reversed(chain))) for chain in chains]
    for place, answer in zip(_scatter(random, tokens, task.asking, answers), answers, strict=True):
        labels[place + 1 : place + len(answer) - 1] = answer[2:]
    return tokens, labels


def _induction(task: Task, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    tokens, labels = _nothing(task, random)
    size = min(PIECE, task.length // 16)
    number = max(2, min(task.length // 8, len(KEYS)) // size)
    pieces = random.choice(KEYS, number * size, replace=False).reshape(number, size)
    _scatter(random, tokens, task.telling, pieces)
    again = random.permutation(pieces)
    for place in _scatter(random, tokens, task.asking, again):
        labels[place : place + size - 1] = tokens[place + 1 : place + size]
    return tokens, labels


ROWS: Mapping[str, Callable[[Task, np.random.Generator], tuple[Numbers, Numbers]]] = {
    "recall": _recall,
    "needle": _needle,
    "straddle": _straddle,
    "counting": _counting,
    "tracking": _tracking,
    "induction": _induction,
}


def _nothing(task: Task, random: np.random.Generator) -> tuple[Numbers, Numbers]:
    """A row of noise that asks nothing yet."""
    return random.choice(NOISE, task.length), np.full(task.length, NO_LABEL)


def _pairs(random: np.random.Generator, number: int) -> Numbers:
    """Keys, each another, and their values, as rows."""
    return np.stack((random.choice(KEYS, number, replace=False), random.choice(VALUES, number)), axis=1)


def _scatter(random: np.random.Generator, tokens: Numbers, where: range, texts: Sequence[Numbers] | Numbers) -> Numbers:
    """Write the texts in their order, with random gaps between them; returns where they begin."""
    lengths = np.array([len(text) for text in texts])
    gaps = np.sort(random.integers(0, len(where) - lengths.sum() + 1, len(texts)))
    places = where.start + gaps + lengths.cumsum() - lengths
    for place, text in zip(places, texts, strict=True):
        tokens[place : place + len(text)] = text
    return places


def _ask_each(task: Task, random: np.random.Generator, tokens: Numbers, labels: Numbers, pairs: Numbers) -> None:
    """A key at every position that asks. No answer is written, so that none helps with the next question."""
    asked = pairs[random.integers(0, len(pairs), len(task.asking))]
    where = slice(task.asking.start, task.asking.stop)
    tokens[where], labels[where] = asked.T
