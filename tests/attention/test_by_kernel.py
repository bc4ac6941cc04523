"""The C++ kernel searches for blocks of queries, and finds what the searches in tensors find."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench.meters.scores import scores
from dsv3.attention import Selection
from dsv3.attention.kernels import blocks as kernel
from dsv3.attention.select import Index, by_kernel, leading, remember
from dsv3.attention.select.blocks import search as search_blocks
from dsv3.attention.select.hierarchical import search as search_tree
from dsv3.attention.select.index import bounds
from dsv3.config import Blocks, Hierarchical, vary
from tests.attention.lists import needs_kernel, searching_in_tensors
from tests.attention.test_blocks import choices, seeds

pytestmark = needs_kernel


def search(choice: Blocks, index: Index, start: int, total: int) -> Selection:
    return (search_tree if isinstance(choice, Hierarchical) else search_blocks)(choice, index, start, total, 1.0)


def in_tensors(choice: Blocks, index: Index, start: int, total: int) -> Selection:
    with searching_in_tensors():
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


@given(seeds, st.one_of(choices(Blocks, top_p=None), choices(top_p=None)), st.integers(1, 300), st.data())
@settings(max_examples=200)
def test_the_kernel_finds_what_the_search_in_tensors_finds(
    seed: int, choice: Blocks, total: int, data: st.DataObject
) -> None:
    whole = data.draw(st.booleans())
    if whole and isinstance(choice, Hierarchical):
        choice = vary(choice, branching=4)  # means of powers of two are exact, so that what is equal is equal to both
    q, k = drawn(seed, total, whole=whole)
    start = data.draw(st.integers(0, total - 1))
    index = grown(choice, q, k, start, total)
    ours, theirs = (one(choice, index, start, total) for one in (search, in_tensors))
    assert torch.equal(ours.counts, theirs.counts)
    listed = torch.arange(ours.indices.shape[-1]) < ours.counts[..., None]
    most = min(ours.indices.shape[-1], theirs.indices.shape[-1])
    assert int(ours.counts.max()) <= most
    assert torch.equal((ours.indices * listed)[..., :most], (theirs.indices * listed[..., :most])[..., :most])
    assert (ours.block_q, ours.block_k, ours.cost.kept) == (theirs.block_q, theirs.block_k, theirs.cost.kept)
    if bounds(choice):  # tensors allow for rounding, and so may open more
        assert ours.cost.scored <= theirs.cost.scored
    else:
        assert ours.cost.per_level == theirs.cost.per_level
    if ours.cost.scored:
        assert ours.cost.computed == ours.cost.scored <= theirs.cost.computed


def test_a_beam_wider_than_the_tree_finds_what_a_flat_search_finds_and_takes_no_more_memory() -> None:
    q, k = drawn(6, 300, whole=False)
    wide = Hierarchical(k=9, block_q=1, block_k=2, width=10**13)
    index = grown(wide, q, k, 0, 300)
    flat = search(Blocks(k=9, block_q=1, block_k=2), index, 0, 300)
    assert torch.equal(search(wide, index, 0, 300).indices, flat.indices)


def test_flat_searches_over_wide_nodes_are_one_product_in_tensors() -> None:
    for choice, total, fits in (
        (Blocks(k=5, block_q=1, block_k=2), 40, False),
        (Blocks(k=5, block_q=1, block_k=2), 1, True),  # a token alone
        (Hierarchical(k=5, block_q=1, block_k=2), 40, True),
    ):
        q, k = drawn(7, 40, whole=False, width=by_kernel.WIDEST + 1)
        index = grown(choice, q, k, 40 - total, 40)
        assert (by_kernel.by_kernel(choice, index, 40 - total, 40) is not None) == fits


@pytest.mark.parametrize("instructions", ["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("width", [3, 16, 37, 64])
@pytest.mark.parametrize("search", ["beam", "best_first"])
def test_each_instruction_set_lists_the_same(instructions: str, width: int, search: str) -> None:
    if instructions not in kernel.instruction_sets():
        pytest.skip(f"this processor lacks {instructions}")
    choice = Hierarchical(k=9, block_q=1, block_k=2, branching=3, search=search)
    q, k = drawn(1, 401, whole=True, width=width)
    index = grown(choice, q, k, 300, 401)
    searches = torch.tensor([(t // 2, 6, 8) for t in range(300, 401)])
    given = {"own": 1, "newest": 200, "longest": 9, "branching": 3, "bounds": bounds(choice)}
    ours, best = (
        kernel.block_choice(index.leaders, index.nodes, searches, **given, instructions=i) for i in (instructions, "")
    )
    assert all(torch.equal(one, two) for one, two in zip(ours[:3], best[:3], strict=True))
    assert ours[3] == best[3]


@pytest.mark.parametrize("choice", [Blocks(k=9, block_q=1, block_k=2), Hierarchical(k=9, block_q=1, block_k=2)])
def test_the_number_of_threads_changes_no_list(choice: Blocks) -> None:
    before, found = torch.get_num_threads(), []
    q, k = drawn(2, 301, whole=False)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(search(choice, grown(choice, q, k, 0, 301), 0, 301))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].indices, other.indices) for other in found[1:])
    assert all(found[0].cost == other.cost for other in found[1:])


@pytest.mark.parametrize("start", [0, 200])
@pytest.mark.parametrize(
    "choice",
    [
        Blocks(k=5, block_q=1, block_k=2),
        Hierarchical(k=5, block_q=4, block_k=2),
        Hierarchical(k=5, block_q=2, block_k=2, search="best_first"),
    ],
)
def test_its_scores_and_flops_are_counted(choice: Blocks, start: int) -> None:
    q, k = drawn(3, 201, whole=False)
    index, found, width = grown(choice, q, k, start, 201), [], 22 if bounds(choice) else 11
    with mock.patch.object(kernel, "block_choice", wraps=kernel.block_choice) as called:
        count = scores(lambda: found.append(search(choice, index, start, 201)), width)
    assert called.call_count == 1
    assert count == found[0].cost.computed == found[0].cost.scored > 0
    with FlopCounterMode(display=False) as counter:
        search(choice, index, start, 201)
    assert counter.get_total_flops() == 2 * width * count


@pytest.mark.parametrize(
    "choice",
    [Blocks(k=5, block_q=1, block_k=2, top_p=0.9), Blocks(k=500, block_q=1, block_k=2)],
    ids=["top_p", "nothing left out"],
)
def test_what_the_kernel_has_no_search_for_is_left_to_tensors(choice: Blocks) -> None:
    q, k = drawn(4, 201, whole=False)
    assert by_kernel.by_kernel(choice, grown(choice, q, k, 200, 201), 200, 201) is None


def test_other_formats_are_left_to_tensors() -> None:
    choice = Blocks(k=5, block_q=2, block_k=2)
    q, k = drawn(5, 204, whole=False)
    assert by_kernel.by_kernel(choice, grown(choice, q, k, 202, 204), 202, 204) is not None
    wide = Index.empty(choice, (2, 4, 2, 11), 204, torch.float64)
    last = remember(choice, q.double()[:, :, leading(choice, 0)], k.double(), 0, 204, wide)
    assert by_kernel.by_kernel(choice, last, 202, 204) is None


def test_a_search_that_cannot_be_is_refused() -> None:
    query, nodes, search = torch.zeros(1, 2, 1, 8), (torch.zeros(1, 2, 20, 8),), torch.tensor([[20, 2, 4]])
    numbers = {"own": 1, "newest": 20, "longest": 5, "branching": 0}
    kernel.block_choice(query, nodes, search, **numbers)
    with pytest.raises(ValueError, match="fewer than those before the query"):
        kernel.block_choice(query, nodes, torch.tensor([[21, 2, 4]]), **numbers)
    with pytest.raises(ValueError, match="fewer than those before the query"):
        kernel.block_choice(query, nodes, search, **numbers | {"branching": 2})
    with pytest.raises(ValueError, match="must be complete key blocks, how many others are seen, and a beam"):
        kernel.block_choice(query, nodes, torch.tensor([[20, 19, 4]]), **numbers | {"longest": 99})
    with pytest.raises(ValueError, match="branching=0: must be 0, where all leaves are scored by their means"):
        kernel.block_choice(query, (torch.zeros(1, 2, 20, 16),), search, **numbers, bounds=True)
    with pytest.raises(ValueError, match="own=0: must be positive"):
        kernel.block_choice(query, nodes, search, **numbers | {"own": 0})
    with pytest.raises(ValueError, match="longest: a list has more blocks"):
        kernel.block_choice(query, nodes, search, **numbers | {"longest": 4})
    # the operator itself: the annotations, where a test run checks them, refuse these before it does
    choose, numbers = torch.ops.dsv3_kernels.choose, (1, 20, 5, 0, False, "")
    with pytest.raises(ValueError, match=r"nodes: must be \[B, g, n, W\]"):
        choose(query, (torch.zeros(1, 2, 20, 7),), search, *numbers)
    with pytest.raises(ValueError, match=r"query: must be \[B, h, Nq, W\]"):
        choose(query[:, :, 0], nodes, search, *numbers)
    with pytest.raises(ValueError, match=r"searches: must be \[Nq, 3\]"):
        choose(query, nodes, search[:, :2], *numbers)
