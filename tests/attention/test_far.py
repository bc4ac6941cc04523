"""The longest sequences and the farthest rows that attention takes; nothing of them is in memory but what is read."""

import pytest
import torch
from torch import Tensor

from dsv3.attention import Selection, SelectionCost, attend
from tests.attention.lists import close, grads, needs_kernel, select

LONGEST = 2**31 - 1  # positions that the kernel counts
WIDTH = 8


def last_block(queries: int, total: int, block_k: int) -> Selection:
    """One block of queries that sees the last block of keys."""
    return Selection(
        indices=torch.full((1, 1, 1, 1), (total - 1) // block_k),
        counts=torch.ones(1, 1, 1, dtype=torch.int64),
        block_q=queries,
        block_k=block_k,
        cost=SelectionCost(scored=0, kept=0),
    )


@needs_kernel
@pytest.mark.parametrize("queries, block_k", [(1, 64), (3, 64), (1, 1), (3, 1), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_key_is_seen_up_to_the_most_positions_and_one_more_is_refused(
    queries: int, block_k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, key = (torch.randn(1, 2, n, WIDTH, generator=generator).to(dtype) for n in (queries, 1))
    k = key.expand(-1, -1, LONGEST, -1)
    out = attend(q, k, k, last_block(queries, LONGEST, block_k), implementation="kernel")
    # a mean of one and the same, up to the rounding of its weights: to 2^-9 in bf16
    close(out[:, :, -1:], key, 1e-6 if dtype == torch.float32 else 1e-2)
    k = key.expand(-1, -1, LONGEST + 1, -1)
    with pytest.raises(ValueError, match=rf"positions={LONGEST + 1}: must be below 2\^31"):
        attend(q, k, k, last_block(queries, LONGEST + 1, block_k), implementation="kernel")


@needs_kernel
@pytest.mark.parametrize("queries, block", [(1, 64), (2, 64), (1, 1), (2, 1)])
def test_rows_of_a_tensor_of_more_than_2_31_numbers_are_read_where_they_lie(queries: int, block: int) -> None:
    """Offsets count numbers and bytes in 64 bits, so that only positions have an end."""
    step = 2**31
    memory = torch.empty(step + 3 * WIDTH, dtype=torch.bfloat16)  # pages that nobody touches are not there
    selection = select((1, 1, 1, 1, queries, 2, WIDTH, WIDTH, block, block), keep=1.0)

    def far(place: int, rows: int) -> Tensor:
        one = memory[place * WIDTH :].as_strided((1, 1, rows, WIDTH), (WIDTH, WIDTH, step, 1))
        return one.copy_(torch.randn(one.shape, generator=generator)).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    leaves = far(0, queries), far(1, 2), far(2, 2)
    near = tuple(x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in leaves)
    ours, theirs = (attend(*x, selection, implementation="kernel") for x in (leaves, near))
    assert torch.equal(ours, theirs)
    assert all(torch.equal(one, two) for one, two in zip(grads(ours, leaves), grads(theirs, near), strict=True))
