"""A block of queries alone is searched for by the C++ kernel, and sees what the searches in tensors find."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench.meters.scores import scores
from dsv3.attention import Selection
from dsv3.attention.kernels import blocks as kernel
from dsv3.attention.select import Index, leading, remember
from dsv3.attention.select import alone as by_kernel
from dsv3.attention.select.blocks import search as search_blocks
from dsv3.attention.select.hierarchical import search as search_tree
from dsv3.config import Blocks, Hierarchical, vary
from tests.attention.lists import needs_kernel
from tests.attention.test_blocks import choices, seeds

pytestmark = needs_kernel


def search(choice: Blocks, index: Index, start: int, total: int) -> Selection:
    return (search_tree if isinstance(choice, Hierarchical) else search_blocks)(choice, index, start, total, 1.0)


def in_tensors(choice: Blocks, index: Index, start: int, total: int) -> Selection:
    with mock.patch.object(by_kernel, "_computable", return_value=False):
        return search(choice, index, start, total)


def drawn(seed: int, total: int, *, whole: bool, width: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of two sequences; whole numbers, of which some are no numbers, make equal scores common."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, heads, total, width, generator=generator) for heads in (4, 2))
    if whole:
        q, k = q.round(), k.round()
        k[torch.rand(k.shape, generator=generator) < 0.01] = float("nan")
        k[torch.rand(k.shape, generator=generator) < 0.01] = float("inf")
    return q, k


def grown(choice: Blocks, q: torch.Tensor, k: torch.Tensor, start: int, total: int) -> Index:
    """The index for the positions from `start` to `total` after all before them."""
    size = (q.shape[0], q.shape[1], k.shape[1], q.shape[3])
    index, first = Index.empty(choice, size, total), start // choice.block_q * choice.block_q
    return index.extend(
        choice, q[:, :, first:total][:, :, leading(choice, first)], k[:, :, :total], 0, total, first=first
    )


@given(
    seeds, st.one_of(choices(Blocks, top_p=None), choices(top_p=None, search="beam")), st.integers(1, 300), st.data()
)
@settings(max_examples=150)
def test_the_kernel_finds_what_the_search_in_tensors_finds(
    seed: int, choice: Blocks, total: int, data: st.DataObject
) -> None:
    whole = data.draw(st.booleans())
    if whole and isinstance(choice, Hierarchical):
        choice = vary(choice, branching=4)  # means of powers of two are exact, so that what is equal is equal to both
    q, k = drawn(seed, total, whole=whole)
    first = (total - 1) // choice.block_q * choice.block_q
    start = data.draw(st.integers(first, total - 1))
    index = grown(choice, q, k, start, total)
    ours, theirs = (one(choice, index, start, total) for one in (search, in_tensors))
    assert torch.equal(ours.counts, theirs.counts)
    listed = torch.arange(ours.indices.shape[-1]) < ours.counts[..., None]
    most = min(ours.indices.shape[-1], theirs.indices.shape[-1])
    assert int(ours.counts.max()) <= most
    assert torch.equal((ours.indices * listed)[..., :most], (theirs.indices * listed[..., :most])[..., :most])
    assert (ours.block_q, ours.block_k, ours.cost) == (theirs.block_q, theirs.block_k, theirs.cost)


@pytest.mark.parametrize("instructions", ["avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("width", [3, 16, 37, 64])
def test_each_instruction_set_lists_the_same(instructions: str, width: int) -> None:
    if instructions not in kernel.instruction_sets():
        pytest.skip(f"this processor lacks {instructions}")
    choice = Hierarchical(k=9, block_q=1, block_k=2, branching=3)
    q, k = drawn(1, 401, whole=True, width=width)
    index = grown(choice, q, k, 400, 401)
    given = {"complete": 200, "free": 6, "beam": 8, "branching": 3, "own": 1, "begun": 1}
    ours, best = (kernel.block_choice(index.leaders, index.nodes, **given, instructions=i) for i in (instructions, ""))
    assert all(torch.equal(one, two) for one, two in zip(ours[:2], best[:2], strict=True))
    assert ours[2] == best[2]


def test_the_number_of_threads_changes_no_list() -> None:
    choice, before, found = Blocks(k=9, block_q=1, block_k=2), torch.get_num_threads(), []
    q, k = drawn(2, 301, whole=False)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(search(choice, grown(choice, q, k, 300, 301), 300, 301))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].indices, other.indices) for other in found[1:])


@pytest.mark.parametrize("choice", [Blocks(k=5, block_q=1, block_k=2), Hierarchical(k=5, block_q=4, block_k=2)])
def test_the_kernel_is_what_searches_for_a_token_and_its_scores_and_flops_are_counted(choice: Blocks) -> None:
    q, k = drawn(3, 201, whole=False)
    index, found = grown(choice, q, k, 200, 201), []
    with mock.patch.object(kernel, "block_choice", wraps=kernel.block_choice) as called:
        count = scores(lambda: found.append(search(choice, index, 200, 201)), 11)
    assert called.call_count == 1
    assert count == found[0].cost.computed == found[0].cost.scored > 0
    with FlopCounterMode(display=False) as counter:
        search(choice, index, 200, 201)
    assert counter.get_total_flops() == 2 * 11 * count


@pytest.mark.parametrize(
    "choice",
    [
        Blocks(k=5, block_q=1, block_k=2, top_p=0.9),
        Hierarchical(k=5, block_q=1, block_k=2, search="best_first"),
        Blocks(k=500, block_q=1, block_k=2),
    ],
    ids=["top_p", "bounds", "nothing left out"],
)
def test_what_the_kernel_has_no_search_for_is_left_to_tensors(choice: Blocks) -> None:
    q, k = drawn(4, 201, whole=False)
    assert by_kernel.alone(choice, grown(choice, q, k, 200, 201), 200, 201) is None


def test_other_formats_and_several_blocks_of_queries_are_left_to_tensors() -> None:
    choice = Blocks(k=5, block_q=2, block_k=2)
    q, k = drawn(5, 204, whole=False)
    assert by_kernel.alone(choice, grown(choice, q, k, 202, 204), 202, 204) is not None
    assert by_kernel.alone(choice, grown(choice, q, k, 200, 204), 200, 204) is None
    wide = Index.empty(choice, (2, 4, 2, 11), 204, torch.float64)
    last = remember(choice, q.double()[:, :, leading(choice, 0)], k.double(), 0, 204, wide)
    assert by_kernel.alone(choice, last, 202, 204) is None


def test_a_search_that_cannot_be_is_refused() -> None:
    query, nodes = torch.zeros(1, 2, 1, 8), (torch.zeros(1, 2, 20, 8),)
    numbers = {"complete": 20, "free": 2, "beam": 4, "branching": 0, "own": 1, "begun": 1}
    kernel.block_choice(query, nodes, **numbers)
    with pytest.raises(ValueError, match="fewer than those before the query"):
        kernel.block_choice(query, nodes, **numbers | {"complete": 21})
    with pytest.raises(ValueError, match="fewer than those before the query"):
        kernel.block_choice(query, nodes, **numbers | {"branching": 2})
    with pytest.raises(ValueError, match="must be those of a search that scores"):
        kernel.block_choice(query, nodes, **numbers | {"complete": 2})
    # the operator itself: the annotations, where a test run checks them, refuse these before it does
    narrow, flat = (torch.zeros(1, 2, 20, 7),), query[:, :, 0]
    with pytest.raises(ValueError, match=r"nodes: must be \[B, g, n, W\]"):
        torch.ops.dsv3_kernels.choose(query, narrow, *numbers.values(), "")
    with pytest.raises(ValueError, match=r"query: must be \[B, h, 1, W\]"):
        torch.ops.dsv3_kernels.choose(flat, nodes, *numbers.values(), "")
