"""One forward, one backward: 1F1B, its interleaved form, and zero bubble H1.

All three are one pattern. A rank runs `warmup` forwards, then a forward and a backward in turn, then the backwards
left:

    1F1B            warmup = p - 1 - r                          PipeDream-Flush, arXiv 2104.04473, section 2.2.1
    interleaved     warmup = (v - 1) q + 2 (p - 1 - r)          Megatron, arXiv 2104.04473, section 2.2.2
    ZB-H1           warmup = (v - 1) q + (p - 1 - r)            Qi et al., arXiv 2401.10241, section 2.1

for rank r of p, with v chunks of the model per rank; q microbatches pass one chunk before the next chunk's turn comes
(q = p if p divides m). Rank r holds stages r, r + p, r + 2p, ... ZB-H1 cuts the backward in two: the input gradient I
keeps 1F1B's place, and the weight gradient W follows r microbatches behind it. So a rank near the end, whose gradients
come early, keeps work to fill the drain, and no rank holds more activations than 1F1B's first one.

ZB-H1 with v > 1 is not in the paper; it is what torch calls InterleavedZeroBubble.
"""

from collections.abc import Iterator

from dsv3.config.rules import require
from dsv3.pipeline.plan import Action, Plan, Row, check_counts

Turn = tuple[int, int]  # (stage, microbatch)


def one_f_one_b(ranks: int, microbatches: int) -> Plan:
    """1F1B: a rank holds no more microbatches than there are ranks from it to the end.

    Raises:
        ValueError: for fewer than one rank or microbatch.
    """
    check_counts(ranks=ranks, microbatches=microbatches)
    turns = _turns(ranks, microbatches, 1)
    rows = tuple(_alternate(*turns[r], warmup=ranks - 1 - r) for r in range(ranks))
    return Plan("1F1B", microbatches, _placement(ranks, 1), rows)


def interleaved_one_f_one_b(ranks: int, microbatches: int, chunks: int = 2) -> Plan:
    """1F1B with `chunks` stages per rank: the bubble shrinks by `chunks`, messages grow by it.

    Raises:
        ValueError: unless the microbatches fall into rounds of equal size, at least as large as the ranks if possible.
    """
    _check_rounds(ranks, microbatches, chunks)
    turns = _turns(ranks, microbatches, chunks)
    first = (chunks - 1) * _per_round(ranks, microbatches)
    rows = tuple(_alternate(*turns[r], warmup=first + 2 * (ranks - 1 - r)) for r in range(ranks))
    return Plan(f"interleaved 1F1B, v={chunks}", microbatches, _placement(ranks, chunks), rows)


def zero_bubble_h1(ranks: int, microbatches: int, chunks: int = 1) -> Plan:
    """1F1B whose weight gradients fill the drain, at 1F1B's peak memory.

    Raises:
        ValueError: as `interleaved_one_f_one_b` where `chunks` > 1.
    """
    _check_rounds(ranks, microbatches, chunks)
    turns = _turns(ranks, microbatches, chunks)
    first = (chunks - 1) * _per_round(ranks, microbatches)
    rows = tuple(tuple(_split(_alternate(*turns[r], warmup=first + ranks - 1 - r), behind=r)) for r in range(ranks))
    return Plan("ZB-H1" if chunks == 1 else f"ZB-H1, v={chunks}", microbatches, _placement(ranks, chunks), rows)


def _placement(ranks: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(rank, ranks * chunks, ranks)) for rank in range(ranks))


def _per_round(ranks: int, microbatches: int) -> int:
    return microbatches // max(1, microbatches // ranks)


def _check_rounds(ranks: int, microbatches: int, chunks: int) -> None:
    check_counts(ranks=ranks, microbatches=microbatches, chunks=chunks)
    rounds = max(1, microbatches // ranks)
    near = microbatches - microbatches % ranks
    rule = f"must be a multiple of its {rounds} rounds (microbatches // ranks={ranks}) when chunks={chunks}"
    require(
        chunks == 1 or microbatches % rounds == 0,
        "microbatches",
        microbatches,
        rule,
        f"use {near} or {near + ranks}",
    )


def _turns(ranks: int, microbatches: int, chunks: int) -> list[tuple[list[Turn], list[Turn]]]:
    """For each rank, the order of its forwards and of its backwards: round by round, chunk by chunk within a round."""
    size = _per_round(ranks, microbatches) if chunks > 1 else microbatches
    rounds = [range(first, first + size) for first in range(0, microbatches, size)]
    upward, downward = range(chunks), range(chunks - 1, -1, -1)

    def order(rank: int, passes: range) -> list[Turn]:
        return [(chunk * ranks + rank, m) for batch in rounds for chunk in passes for m in batch]

    return [(order(rank, upward), order(rank, downward)) for rank in range(ranks)]


def _alternate(forwards: list[Turn], backwards: list[Turn], warmup: int) -> Row:
    warmup = min(warmup, len(forwards))
    row = [Action(stage, "F", m) for stage, m in forwards[:warmup]]
    for done, (stage, m) in enumerate(backwards):
        row += [Action(s, "F", k) for s, k in forwards[warmup + done : warmup + done + 1]]
        row.append(Action(stage, "B", m))
    return tuple(row)


def _split(row: Row, behind: int) -> Iterator[Action]:
    """Cut each B into I and W; a W comes `behind` backwards after its I, and the last ones at the end."""
    waiting: list[Action] = []
    for action in (action for step in row for action in step.actions):
        if action.kind == "F":
            yield action
            continue
        yield Action(action.stage, "I", action.microbatch)
        waiting.append(Action(action.stage, "W", action.microbatch))
        if len(waiting) > behind:
            yield waiting.pop(0)
    yield from waiting
