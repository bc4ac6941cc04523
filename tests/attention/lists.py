"""Random inputs of attention and random lists of blocks, and how their results are compared."""

from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from torch import Tensor

from dsv3.attention import Selection, SelectionCost, reference
from dsv3.attention.kernels import blocks, triton_blocks
from dsv3.attention.select import by_kernel

REASON = blocks.why_not()
needs_kernel = pytest.mark.skipif(REASON is not None, reason=f"no kernel here: {REASON}")
NOT_INTERPRETED = triton_blocks.why_not("cpu", 16)
needs_interpreter = pytest.mark.skipif(NOT_INTERPRETED is not None, reason=f"no Triton here: {NOT_INTERPRETED}")
KERNEL = pytest.param("kernel", marks=needs_kernel)
by_each = pytest.mark.parametrize("implementation", [KERNEL, pytest.param("triton", marks=needs_interpreter), "plain"])
by_cpu = pytest.mark.parametrize("implementation", [KERNEL, "plain"])  # an interpreter takes milliseconds for a tile


def searching_in_tensors() -> AbstractContextManager[object]:
    """As if there were no C++ kernel to search."""
    return mock.patch.object(by_kernel, "_computable", return_value=False)


# batch, heads, groups, heads of the selection, queries, positions, width, value, block_q, block_k
SHAPES = {
    "one token": (2, 2, 2, 2, 1, 1, 8, 8, 64, 64),
    "decoding": (2, 4, 2, 4, 1, 100, 16, 16, 64, 16),
    "decoding afar": (2, 4, 2, 4, 1, 900, 24, 40, 1, 48),
    "decoding long blocks": (1, 2, 1, 2, 1, 900, 7, 5, 64, 256),
    "decoding many heads": (2, 30, 2, 1, 1, 700, 24, 40, 1, 5),
    "decoding heads of a latent": (1, 80, 1, 1, 1, 900, 72, 64, 64, 64),
    "many heads each": (2, 18, 2, 2, 40, 300, 24, 40, 1, 3),
    "many heads far": (1, 70, 1, 1, 3, 700, 16, 24, 1, 1),
    "63 tokens": (2, 2, 2, 1, 63, 63, 16, 16, 64, 64),
    "60 of 100": (1, 4, 2, 2, 60, 100, 48, 32, 16, 16),
    "one by one": (2, 4, 2, 2, 60, 100, 24, 40, 1, 7),
    "two by two": (1, 4, 1, 4, 300, 301, 7, 16, 2, 2),
    "latent": (1, 2, 1, 1, 100, 100, 24, 16, 64, 64),
    "odd widths": (1, 2, 2, 2, 70, 90, 7, 5, 32, 48),
    "long blocks": (1, 2, 1, 2, 110, 300, 16, 40, 100, 256),
    "wide": (1, 1, 1, 1, 66, 66, 80, 72, 64, 32),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, groups, _, queries, total, width, value, *_ = shape
    generator = torch.Generator().manual_seed(seed)

    def one(*sizes: int) -> Tensor:
        # heads behind positions in memory, as projections leave them
        return torch.randn(*sizes, generator=generator).to(dtype).transpose(1, 2).requires_grad_()

    return one(batch, queries, heads, width), one(batch, total, groups, width), one(batch, total, groups, value)


def select(shape: tuple[int, ...], keep: float = 0.5, seed: int = 0) -> Selection:
    """Random lists; every query's own block is listed, so that it sees a key."""
    batch, _, _, shared, queries, total, *_, block_q, block_k = shape
    generator = torch.Generator().manual_seed(seed)
    blocks_q, blocks_k = -(-queries // block_q), -(-total // block_k)
    listed = torch.rand(batch, shared, blocks_q, blocks_k, generator=generator) < keep
    for i in range(blocks_q):
        first = total - queries + i * block_q
        last = min(first + block_q, total) - 1
        listed[:, :, i, first // block_k : last // block_k + 1] = True
        listed[:, :, i, last // block_k + 1 :] = False
    return of_lists(listed, block_q, block_k)


def of_lists(listed: Tensor, block_q: int, block_k: int) -> Selection:
    counts = listed.sum(-1)
    order = listed.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return Selection(
        indices=order[..., : int(counts.max())],
        counts=counts,
        block_q=block_q,
        block_k=block_k,
        cost=SelectionCost(scored=0, kept=0),
    )


def grads(out: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, pull)


def right(leaves: tuple[Tensor, ...], shape: tuple[int, ...], selection: Selection, scale: float) -> Tensor:
    seen = reference.selected(selection, heads=shape[1], queries=shape[4], total=shape[5])
    q, k, v, *weights = leaves
    spread = weights[0].repeat_interleave(shape[1] // shape[3], dim=1) if weights else None
    return reference.attention(q, k, v, seen, scale=scale, weights=spread)


def close(ours: Tensor, theirs: Tensor, error: float) -> None:
    """Within `error` of the largest number: a sum's rounding is that of its terms, not of what is left of them."""
    bound = error * max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0.0, atol=bound)
