"""DualPipe: two streams of microbatches that enter a pipeline from its two ends (arXiv 2412.19437, section 3.2.1).

A rank holds one stage of each direction, and runs a forward of one stream together with a backward of the other, so
that the messages of either hide behind the computation of both. Fold the pipeline in its middle and the two ranks of a
pair run the same row with the directions swapped; keep one rank of each pair, which then holds both stages, and the
second stream is the first one on its way back: that is DualPipeV ("cut in half", adopted by DeepSeek). So one row
describes both. With n ranks in a V, rank r of them counted from where microbatches enter, direction 0 on its way in and
direction 1 on its way out:

    2 (n-1-r) x   F0
      (r+1)   x   F0 F1
      (n-1-r) x   I1 W F1
    the rest  x   F0&B1 F1&B0         & marks an overlapped pair; the turning rank does not pair its first one
      (n-1-r) x   B1 F1&B0
      (r+1)   x   B1 B0               whose second half are I
      (n-1-r) x   W I0
      (r+1)   x   W

following deepseek-ai/DualPipe. Each direction needs at least 2n microbatches.
"""

from collections.abc import Iterator
from itertools import chain, repeat

from dsv3.config.rules import require
from dsv3.pipeline.plan import Action, Pair, Plan, Row, Step, check_counts


def dual_pipe(ranks: int, microbatches: int) -> Plan:
    """Bidirectional DualPipe: microbatches 0 .. m/2 - 1 enter at rank 0, the other half at the last rank.

    Every stage is held by two ranks (r and p - 1 - r), so the weights are stored twice.

    Raises:
        ValueError: unless `ranks` is even, and `microbatches` is even and at least twice `ranks`.
    """
    check_counts(ranks=ranks, microbatches=microbatches)
    require(ranks % 2 == 0, "ranks", ranks, "must be even: ranks pair up around the middle", f"use {ranks + 1}")
    _check_enough(ranks, microbatches)
    rule = "must be even: half of them enter from each end"
    require(microbatches % 2 == 0, "microbatches", microbatches, rule, f"use {microbatches + 1}")
    half = microbatches // 2
    rows = []
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)
        first = (0, half) if rank < ranks // 2 else (half, 0)
        rows.append(_row(_cells(near, ranks // 2, half), (near, ranks - 1 - near), first))
    placement = tuple(tuple(sorted((rank, ranks - 1 - rank))) for rank in range(ranks))
    return Plan("DualPipe", microbatches, placement, tuple(rows))


def dual_pipe_v(ranks: int, microbatches: int) -> Plan:
    """DualPipe cut in half: each of `ranks` devices holds stages r and 2p - 1 - r, and weights are stored once.

    Raises:
        ValueError: unless `microbatches` is at least twice `ranks`.
    """
    check_counts(ranks=ranks, microbatches=microbatches)
    _check_enough(ranks, microbatches)
    placement = tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
    rows = tuple(_row(_cells(rank, ranks, microbatches), placement[rank], (0, 0)) for rank in range(ranks))
    return Plan("DualPipeV", microbatches, placement, rows)


def _check_enough(ranks: int, microbatches: int) -> None:
    rule = f"must be at least 2 x ranks={2 * ranks}: fewer never reach the phase where directions overlap"
    require(microbatches >= 2 * ranks, "microbatches", microbatches, rule, f"use {2 * ranks} or more, or fewer ranks")


def _cells(rank: int, ranks: int, microbatches: int) -> Iterator[str]:
    """The row of one rank of the V as words: kind and direction, `W` for the oldest weight gradient not yet run."""
    away, here = ranks - 1 - rank, rank + 1
    steady = microbatches - 2 * ranks + here
    turn = ("F0", "B1", "F1&B0") if away == 0 else ("F0&B1", "F1&B0")
    drain = [f"{'B' if done < here else 'I'}{1 - done % 2}" for done in range(2 * here)]
    return chain(
        repeat("F0", 2 * away),
        ("F0", "F1") * here,
        ("I1", "W", "F1") * away,
        turn,
        ("F0&B1", "F1&B0") * (steady - 1),
        ("B1", "F1&B0") * away,
        drain,
        ("W", "I0") * away,
        repeat("W", here),
    )


def _row(cells: Iterator[str], stages: tuple[int, int], first: tuple[int, int]) -> Row:
    """Give each word its stage and its microbatch: every direction counts its own, from `first`."""
    forwards, backwards = list(first), list(first)
    waiting: list[Action] = []

    def action(word: str) -> Action:
        if word == "W":
            return waiting.pop(0)
        kind, direction = word[0], int(word[1])
        count = forwards if kind == "F" else backwards
        microbatch = count[direction]
        count[direction] += 1
        if kind == "I":
            waiting.append(Action(stages[direction], "W", microbatch))
        return Action(stages[direction], kind, microbatch)  # type: ignore[arg-type]  # `_cells` writes F, I and B

    steps: list[Step] = []
    for cell in cells:
        done = [action(word) for word in cell.split("&")]
        steps.append(done[0] if len(done) == 1 else Pair(*done))
    return tuple(steps)
