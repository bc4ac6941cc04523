"""Against torch.distributed.pipelining's own schedules, action by action."""

import pytest

pytest.importorskip("torch.distributed.pipelining")
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import _Action

from dsv3.pipeline import (
    Plan,
    dual_pipe,
    dual_pipe_v,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    validate,
    zero_bubble_h1,
)


def torch_rows(schedule: str, ranks: int, microbatches: int, chunks: int | None = None) -> list[list[str]]:
    """The computations of torch's schedule: without its idle slots and its collectives over data parallel ranks."""
    rows = get_schedule_ops(schedule, ranks, microbatches, num_stages_per_rank=chunks)
    return [[str(action) for action in row if action is not None and action.is_compute_op] for row in rows]


def rows(plan: Plan) -> list[list[str]]:
    return [[str(step) for step in row] for row in plan.rows]


@pytest.mark.parametrize("ranks, microbatches", [(2, 2), (4, 8), (4, 10), (3, 7), (5, 3)])
def test_gpipe_is_torchs(ranks: int, microbatches: int) -> None:
    assert rows(gpipe(ranks, microbatches)) == torch_rows("GPipe", ranks, microbatches)


@pytest.mark.parametrize("ranks, microbatches", [(2, 2), (4, 8), (4, 10), (3, 7)])
def test_1f1b_is_torchs_but_for_the_last_rank_whose_forwards_torch_numbers_from_one(
    ranks: int, microbatches: int
) -> None:
    ours, theirs = rows(one_f_one_b(ranks, microbatches)), torch_rows("1F1B", ranks, microbatches)
    assert ours[:-1] == theirs[:-1]
    # torch up to 2.13 counts them 1 .. m in this listing, though its 1F1B runtime runs 0 .. m - 1.
    last = [f"{ranks - 1}F{m}" for m in range(microbatches)]
    shifted = [f"{ranks - 1}F{m + 1}" for m in range(microbatches)]
    assert ours[-1][::2] == last
    assert theirs[-1][::2] in (shifted, last)
    assert ours[-1][1::2] == theirs[-1][1::2]


CHUNKED = [(2, 4, 2), (4, 8, 2), (4, 8, 3), (4, 10, 2), (3, 9, 4), (4, 3, 2)]


@pytest.mark.parametrize("ranks, microbatches, chunks", CHUNKED)
def test_interleaved_1f1b_is_torchs(ranks: int, microbatches: int, chunks: int) -> None:
    ours = rows(interleaved_one_f_one_b(ranks, microbatches, chunks))
    assert ours == torch_rows("Interleaved1F1B", ranks, microbatches, chunks)


@pytest.mark.parametrize("ranks, microbatches, chunks", CHUNKED)
def test_zero_bubble_h1_over_chunks_is_torchs_interleaved_zero_bubble(
    ranks: int, microbatches: int, chunks: int
) -> None:
    ours = rows(zero_bubble_h1(ranks, microbatches, chunks))
    assert ours == torch_rows("InterleavedZeroBubble", ranks, microbatches, chunks)


@pytest.mark.parametrize("ranks, microbatches", [(1, 2), (2, 4), (4, 8), (4, 10), (3, 11)])
def test_dual_pipe_v_is_torchs(ranks: int, microbatches: int) -> None:
    assert rows(dual_pipe_v(ranks, microbatches)) == torch_rows("DualPipeV", ranks, microbatches, 2)


@pytest.mark.parametrize("microbatches, chunks", [(5, 3), (7, 2)])
def test_torch_refuses_the_rounds_that_are_refused_here(microbatches: int, chunks: int) -> None:
    with pytest.raises(ValueError, match="multiple of the number of rounds"):
        torch_rows("Interleaved1F1B", 2, microbatches, chunks)
    with pytest.raises(ValueError, match=r"must be a multiple of its \d rounds"):
        interleaved_one_f_one_b(2, microbatches, chunks)


@pytest.mark.parametrize("plan", [dual_pipe(4, 8), zero_bubble_h1(3, 5), one_f_one_b(4, 6)], ids=lambda plan: plan.name)
def test_torch_reads_every_cell_and_prints_it_alike(plan: Plan) -> None:
    validate(plan)
    for row in rows(plan):
        assert [str(_Action.from_str(cell)) for cell in row] == row
