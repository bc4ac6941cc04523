"""What a search really computes: products counted by their operands as it runs, against the closed forms."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.meters.memory import peak_bytes
from bench.meters.scores import scores
from dsv3.attention import Selection
from dsv3.attention.select import blocks, hierarchical, leading, remember
from dsv3.attention.select.blocks import search as search_blocks
from dsv3.attention.select.hierarchical import search as search_tree
from dsv3.attention.select.index import Index, bounds
from dsv3.attention.select.indexer import indexer
from dsv3.config import Blocks, Hierarchical, vary
from dsv3.config.counts import scored, scored_in_all
from tests.attention.lists import needs_kernel, searching_in_tensors
from tests.attention.test_blocks import choices, listed, seeds

MILLION = 2**20
WIDTH = 11  # no other number of columns comes up in a search
KINDS = {
    "flat": Blocks(k=16),
    "beam": Hierarchical(k=16),
    "best_first": Hierarchical(k=16, search="best_first"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
by_both = pytest.mark.parametrize("searched", [pytest.param("by the kernel", marks=needs_kernel), "in tensors"])


def searching(searched: str) -> AbstractContextManager[object]:
    return searching_in_tensors() if searched == "in tensors" else nullcontext()


def drawn(total: int, *, heads: int = 2, groups: int = 1, width: int = WIDTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, n, total, width, generator=generator) for n in (heads, groups))
    return q, k


def run(choice: Blocks, index: Index, start: int, total: int) -> tuple[Selection, int]:
    """The search for the positions from `start` to `total`, and the scores that it computed."""
    search, found = search_tree if isinstance(choice, Hierarchical) else search_blocks, []
    count = scores(lambda: found.append(search(choice, index, start, total, 1.0)), index.nodes[0].shape[-1])
    return found[0], count


def alone(choice: Blocks, index: Index, total: int) -> Iterator[tuple[int, Selection, int]]:
    """Each block of queries searching by itself, as in decoding: complete blocks before it, what it found and took."""
    for row in range(index.leaders.shape[2]):
        start = row * choice.block_q
        one = replace(index, leaders=index.leaders[:, :, row : row + 1])
        yield start // choice.block_k, *run(choice, one, start, min(total, start + choice.block_q))


@given(st.one_of(choices(Blocks), choices()), seeds, st.integers(1, 80))
@settings(max_examples=40)
def test_a_search_alone_computes_the_closed_form_and_says_so(choice: Blocks, seed: int, total: int) -> None:
    q, k = drawn(total, heads=4, groups=2, seed=seed)
    index = remember(choice, q[:, :, leading(choice, 0)], k, 0, total)
    heads, beams = index.leaders.shape[1], 0
    for complete, found, count in alone(choice, index, total):
        closed = heads * sum(scored(choice, complete))
        assert count == found.cost.computed == found.cost.scored
        assert count >= closed if bounds(choice) else count == closed
        beams += closed
    assert beams == heads * sum(scored_in_all(choice, 0, total))


@by_both
@every_kind
@pytest.mark.parametrize("block_q", [1, 64], ids=["per token", "per block"])
@pytest.mark.parametrize("total", [63, 1025, 4095, 4161])
def test_searches_side_by_side_compute_what_they_say_and_little_more_than_each_alone(
    kind: str, block_q: int, total: int, searched: str
) -> None:
    choice = vary(KINDS[kind], block_q=block_q, block_k=16)
    q, k = drawn(total)
    selector, found = (hierarchical if isinstance(choice, Hierarchical) else blocks), []
    with searching(searched):
        count = scores(lambda: found.append(selector(q, k, choice)), WIDTH * (2 if bounds(choice) else 1))
    cost = found[0].cost
    assert count == cost.computed >= cost.scored
    if searched == "by the kernel":
        assert cost.computed == cost.scored
    elif kind == "flat":
        # the rows of each of eight parts are as long as its last; the parts of few blocks of queries are uneven
        assert cost.computed <= (1 + 1 / 8) * cost.scored + 2 * total / block_q * 16
    else:
        # a search is at most as long as the longest beside it: w nodes and the straddling one, opened on each level
        beam, levels = choice.beam(total // 16), 1 + len(scored(choice, total // 16))
        longest = choice.branching * (beam + 1) * levels
        assert cost.computed <= 2 * -(-total // block_q) * longest + (cost.scored if kind == "best_first" else 0)


@every_kind
@pytest.mark.parametrize("block_q", [1, 64], ids=["per token", "per block"])
def test_the_closed_form_is_what_is_computed_at_positions_up_to_a_million(kind: str, block_q: int) -> None:
    choice = vary(KINDS[kind], block_q=block_q, block_k=64)
    q, k = drawn(MILLION, heads=1, width=2)
    index = remember(choice, q[:, :, leading(choice, 0)], k, 0, MILLION)
    for position in (63, 64, 1000, 1089, 4096, 65_535, 65_536, 100_000, 777_777, 999_999, MILLION - 1):
        row = position // block_q
        start, complete = row * block_q, row * block_q // 64
        one = replace(index, leaders=index.leaders[:, :, row : row + 1])
        found, count = run(choice, one, start, min(MILLION, start + block_q))
        closed = sum(scored(choice, complete))
        assert count == found.cost.computed == found.cost.scored
        assert count >= closed if kind == "best_first" else count == closed


@by_both
@pytest.mark.parametrize("kind", ["flat", "beam"])
def test_all_blocks_of_a_million_tokens_compute_the_closed_form_or_little_more(kind: str, searched: str) -> None:
    choice = KINDS[kind]
    q, k = drawn(MILLION, heads=1, width=2)
    index = remember(choice, q[:, :, leading(choice, 0)], k, 0, MILLION)
    with searching(searched):
        found, count = run(choice, index, 0, MILLION)
    assert count == found.cost.computed
    if searched == "by the kernel":
        assert count == found.cost.scored
    else:
        # side by side are 64 (flat) or 1024 searches of 16384
        assert found.cost.scored < count < 1.1 * found.cost.scored
    assert found.cost.scored == sum(scored_in_all(choice, 0, MILLION))


@pytest.mark.parametrize("queries", [1, 5, 120])
def test_an_indexer_computes_what_it_says_in_each_of_its_heads(queries: int) -> None:
    heads, generator = 3, torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, heads, WIDTH, generator=generator)
    k, weight = torch.randn(2, 120, WIDTH, generator=generator), torch.randn(2, queries, heads, generator=generator)
    found: list[Selection] = []
    count = scores(lambda: found.append(indexer(q, weight, k, topk=20)), WIDTH)
    cost = found[0].cost
    assert count == heads * cost.computed
    # a token alone computes no more than it needs; rows side by side are as long as the last of them
    assert cost.computed == cost.scored if queries == 1 else cost.computed > cost.scored


class _Written(TorchDispatchMode):
    """Adds up the numbers that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


@by_both
@pytest.mark.parametrize("kind", ["beam", "best_first"])
def test_a_step_of_decoding_computes_and_writes_hardly_more_where_the_sequence_is_16_times_as_long(
    kind: str, searched: str
) -> None:
    """Keys that grow along the sequence: the best are the latest, and their bounds say so."""
    choice, written, computed = vary(KINDS[kind], block_q=1, block_k=1), [], []
    for total in (2**10, 2**14):
        k = torch.linspace(0.0, 1.0, total)[None, None, :, None]
        index = remember(choice, torch.ones_like(k), k, 0, total)
        one = replace(index, leaders=index.leaders[:, :, -1:])
        with _Written() as numbers, searching(searched):
            computed.append(search_tree(choice, one, total - 1, total, 1.0).cost.computed)
        written.append(numbers.total)
    assert written[1] < 2 * written[0]
    assert computed[1] < 2 * computed[0]


@pytest.mark.parametrize("block_q", [1, 4])
@pytest.mark.parametrize("search", ["beam", "best_first"])
@pytest.mark.parametrize("keys", [slice(25, 26), slice(None)], ids=["one key", "all keys"])
def test_keys_that_are_no_numbers_are_not_chosen_and_change_no_other_head(
    block_q: int, search: str, keys: slice
) -> None:
    choice = Hierarchical(k=6, block_q=block_q, block_k=2, branching=2, search=search)
    q, k = drawn(200, heads=3, groups=3)
    clean = hierarchical(q, k, choice)
    k[0, 0, keys] = float("nan")
    index = remember(choice, q[:, :, leading(choice, 0)], k, 0, 200)
    found = listed(hierarchical(q, k, choice))
    assert found[1:] == listed(clean)[1:]
    for (complete, one, _), row, before in zip(alone(choice, index, 200), found[0], listed(clean)[0], strict=True):
        assert listed(one)[0][0] == row
        forced = {0, max(0, complete - 1), *range(complete, complete + choice.own)}
        if complete <= choice.past(complete):
            continue  # everything is seen, without a score
        if keys.stop is None:
            assert set(row) == forced
        elif search == "best_first":
            # the blocks of the largest bounds among the others, one more in the place of the one that is hidden
            assert set(before) - {12} <= set(row)
            assert len(row) == choice.k
            assert 12 not in row or 12 in forced


def test_bounds_are_taken_of_keys_as_they_lie() -> None:
    """In fp32 the keys would be twice as large, and once more for the smallest and the largest numbers apart."""
    choice = Hierarchical(k=16, search="best_first")
    k = torch.randn(1, 1, 16_384, 64).bfloat16()
    q = k[:, :, leading(choice, 0)]

    def extend(index: Index) -> Index:
        return index.extend(choice, q, k, 0, k.shape[2])

    peak = peak_bytes(lambda: Index.empty(choice, (1, 1, 1, 64), k.shape[2], k.dtype), extend)[0].value
    assert peak < k.nbytes / 4
