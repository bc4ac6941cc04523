"""Choosing by content, flat and by a tree: against loops in float64, against each other, and by counts."""

from itertools import accumulate
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.attention import KeyValueCache, Selection, attend, reference
from dsv3.attention.select import blocks, hierarchical
from dsv3.attention.select import reference as by_content
from dsv3.attention.select.best import best, fewest
from dsv3.attention.select.index import Index
from dsv3.config import Blocks, Hierarchical, vary
from dsv3.config.counts import repeats, scored, scored_in_all
from tests.attention.variants import ATTENTIONS, config, hidden, module

seeds = st.integers(0, 2**31)
sizes = st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 2), (2, 4)])
SHARED = ("head", "group", "all")


@st.composite
def choices(draw: st.DrawFn, kind: type[Blocks] = Hierarchical, **fixed: object) -> Blocks:
    block_q, block_k = draw(sizes)
    smallest = max(1, block_q // block_k) + 2
    share = draw(st.booleans())
    given: dict[str, object] = {
        "k": None if share else draw(st.integers(smallest, smallest + 6)),
        "keep": draw(st.floats(0.05, 1.0)) if share else None,
        "top_p": draw(st.none() | st.floats(0.1, 1.0)),
        "block_q": block_q,
        "block_k": block_k,
        "sharing": draw(st.sampled_from(SHARED)),
    }
    if kind is Hierarchical:
        given |= {"branching": draw(st.integers(2, 5)), "search": draw(st.sampled_from(["beam", "best_first"]))}
        given["width"] = draw(st.none() | st.integers(1, 9))
    return kind(**given | fixed)


def choose(choice: Blocks, q: torch.Tensor, k: torch.Tensor, **options: object) -> Selection:
    selector = hierarchical if isinstance(choice, Hierarchical) else blocks
    return selector(q, k, choice, **options)


def drawn(seed: int, total: int, *, whole: bool = False, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    """q and k; whole numbers make equal scores common."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [(1, heads, total, 4), (1, groups, total, 4)]
    if whole:
        return [torch.randint(-1, 2, shape, generator=generator).double() for shape in kinds]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in kinds]


def listed(selection: Selection) -> list[list[list[int]]]:
    """The blocks of every head and block of queries, of the only sequence."""
    rows = zip(selection.indices[0].tolist(), selection.counts[0].tolist(), strict=True)
    return [[row[:count] for row, count in zip(*head, strict=True)] for head in rows]


@given(seeds, st.one_of(choices(Blocks), choices()), st.integers(1, 70), st.booleans())
@settings(max_examples=50)
def test_every_query_sees_the_keys_of_the_loops_on_random_numbers_and_on_ties(
    seed: int, choice: Blocks, total: int, whole: bool
) -> None:
    q, k = drawn(seed, total, whole=whole)
    if whole:
        # block sizes are powers of two, so means are exact; a power of two keeps the mean over heads exact as well
        choice = vary(choice, branching=4) if isinstance(choice, Hierarchical) else choice
        # sums of these weights equal no 0.37: where a sum is the mass itself, rounding decides
        choice = vary(choice, top_p=choice.top_p and 0.37)
    found = choose(choice, q, k, scale=0.5)
    seen = reference.selected(found, heads=4, queries=total, total=total)
    expected = by_content.content(choice, q, k, scale=0.5)
    kept = 0
    for head in range(4):
        for position in range(total):
            keys = list(seen(0, head, position))
            assert keys == list(expected(0, head, position))
            kept += len(keys)
    assert kept == found.cost.kept * 4 // found.indices.shape[1]


@given(seeds, choices(top_p=None), st.integers(1, 90))
@settings(max_examples=30)
def test_a_beam_as_wide_as_there_are_blocks_finds_what_the_flat_choice_finds(
    seed: int, choice: Hierarchical, total: int
) -> None:
    q, k = drawn(seed, total)
    flat = Blocks(**{name: getattr(choice, name) for name in ("k", "keep", "block_q", "block_k", "sharing")})
    wide = vary(choice, search="beam", width=90)
    assert listed(choose(wide, q, k)) == listed(choose(flat, q, k))


@given(seeds, choices(search="best_first", sharing="head", top_p=None), st.integers(1, 90))
@settings(max_examples=30)
def test_best_first_search_finds_exactly_the_blocks_of_the_largest_bound_and_counts_what_it_scored(
    seed: int, choice: Hierarchical, total: int
) -> None:
    q, k = drawn(seed, total, heads=1, groups=1)
    found, nodes = choose(choice, q, k), 0
    for row, seen in enumerate(listed(found)[0]):
        complete = row * choice.block_q // choice.block_k
        score = by_content.node_score(choice, [(q[0, 0, row * choice.block_q], k[0, 0])])
        assert [j for j in seen if j < complete] == by_content.past_blocks(choice, complete, score)
        queued, opened = by_content.by_priority(choice, complete, score)
        assert set(queued[: choice.past(complete) - min(2, complete)]) <= set(seen)
        nodes += opened
    if choice.past(complete) > 2:
        most = sum(
            c // choice.branching**level for c, n in repeats(choice, 0, total) for level in range(7) for _ in range(n)
        )
        assert found.cost.scored <= most + sum(scored_in_all(choice, 0, total))
        assert nodes <= most


@given(seeds, st.integers(2, 5), st.integers(1, 4), st.integers(1, 100))
@settings(max_examples=30)
def test_bounds_never_rise_from_a_node_to_its_child_nor_to_a_score(
    seed: int, branching: int, block: int, total: int
) -> None:
    choice = Hierarchical(k=3, block_q=block, block_k=block, branching=branching, search="best_first")
    q, k = (x.float() for x in drawn(seed, total, heads=1, groups=1))
    index = Index.empty(choice, (1, 1, 1, 4), total)
    index.extend(choice, q[:, :, ::block], k, 0, total)
    query = q[0, 0, -1]
    sides = torch.cat((query.clamp(min=0), query.clamp(max=0)))
    below, ratio = (k[0, 0] * query).sum(1), block
    for level in index.nodes:
        bound = (level[0, 0] * sides).sum(1)
        children = below[: len(bound) * ratio].view(-1, ratio)
        # a bound and a score sum the same four products, each rounded alike
        assert bool((bound[:, None] >= children - 1e-6).all())
        below, ratio = bound, branching


@given(seeds, st.one_of(choices(Blocks), choices()), st.integers(2, 80), st.data())
@settings(max_examples=40)
def test_no_later_token_changes_what_a_query_sees(seed: int, choice: Blocks, total: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, total - 1))
    q, k = drawn(seed, total)
    one = choose(choice, q, k)
    for x, other in zip((q, k), drawn(seed + 1, total), strict=True):
        x[:, :, cut:] = 5 * other[:, :, cut:]
    two = choose(choice, q, k)
    now, then = (reference.selected(s, heads=4, queries=total, total=total) for s in (one, two))
    for head in range(4):
        assert all(list(now(0, head, t)) == list(then(0, head, t)) for t in range(cut))


@given(seeds, st.one_of(choices(Blocks), choices()), st.integers(1, 60), st.permutations(range(3)))
@settings(max_examples=30)
def test_sequences_and_heads_choose_for_themselves(seed: int, choice: Blocks, total: int, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 3, 3, total, 4, generator=generator, dtype=torch.float64)
    found, batches = choose(choice, q, k), choose(choice, q[order], k[order])
    assert torch.equal(batches.indices, found.indices[order])
    assert torch.equal(batches.counts, found.counts[order])
    if choice.sharing != "all":
        heads = choose(choice, q[:, order], k[:, order])
        assert torch.equal(heads.indices, found.indices[:, order])
        assert torch.equal(heads.counts, found.counts[:, order])


@given(seeds, st.one_of(choices(Blocks), choices()), st.lists(st.integers(1, 30), min_size=1, max_size=4))
@settings(max_examples=30)
def test_packed_documents_choose_as_each_does_alone(seed: int, choice: Blocks, lengths: list[int]) -> None:
    size = max(choice.block_q, choice.block_k)
    padded = [-(-length // size) * size for length in lengths[:-1]]
    starts = [0, *accumulate(padded)]
    total = starts[-1] + lengths[-1]
    q, k = drawn(seed, total)
    packed = choose(choice, q, k, documents=starts)
    seen = reference.selected(packed, heads=4, queries=total, total=total)
    kept = 0
    for low, high in zip(starts, [*starts[1:], total], strict=True):
        part = choose(choice, q[:, :, low:high], k[:, :, low:high])
        alone = reference.selected(part, heads=4, queries=high - low, total=high - low)
        kept += part.cost.kept
        for head in range(4):
            for t in range(high - low):
                assert list(seen(0, head, low + t)) == [low + key for key in alone(0, head, t)]
    assert packed.cost.kept == kept
    assert packed.cost.scored == sum(packed.cost.per_level)


@pytest.mark.parametrize("name", ["grouped", "latent"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("search", ["flat", "beam", "best_first"])
def test_tokens_decoded_one_by_one_choose_what_the_whole_forward_chooses(name: str, rotated: bool, search: str) -> None:
    """Per token, and after going back to an earlier length and on with other tokens."""
    shape = {"k": 4, "block_q": 1, "block_k": 2, "rotated": rotated}
    choice = Blocks(**shape) if search == "flat" else Hierarchical(**shape, branching=2, search=search)
    model = config(ATTENTIONS[name], choice)
    made, x = module(model), hidden(29)
    cache = KeyValueCache.empty(model, 2, 29, torch.float64)
    with torch.no_grad():
        made(x[:, :9], cache=cache.layers[0])
        made(hidden(20, seed=7), cache=cache.advance(9).layers[0])
        cache = cache.advance(9)
        whole, every = made(x)
        for i in range(9, 29):
            out, selection = made(x[:, i : i + 1], cache=cache.layers[0])
            cache = cache.advance(1)
            assert torch.equal(selection.counts[:, :, 0], every.counts[:, :, i])
            most = int(selection.counts.max())
            assert torch.equal(selection.indices[:, :, 0, :most], every.indices[:, :, i, :most])
            torch.testing.assert_close(out, whole[:, i : i + 1], rtol=1e-12, atol=1e-12)
    held = cache.layers[0].index
    assert held is not None
    buffers = sum(buffer.nbytes for buffer in cache.layers[0].buffers.values())
    largest = 0 if held.largest is None else held.largest.nbytes
    assert (held.largest is None) == (search != "best_first")
    assert cache.nbytes == buffers + held.leaders.nbytes + sum(level.nbytes for level in held.nodes) + largest


def test_the_blocks_of_a_sequence_worked_by_hand() -> None:
    """One key per block: 9 1 5 7 3 2 and a query of 1. Block 0 and the previous are forced, one more may be chosen."""
    k = torch.tensor([9.0, 1.0, 5.0, 7.0, 3.0, 2.0])[None, None, :, None]
    q = torch.ones(1, 1, 6, 1)
    choice = Blocks(k=4, block_q=1, block_k=1)
    assert listed(blocks(q, k, choice)) == [[[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5]]]
    assert blocks(q, k, choice).cost.per_level == (2 + 3,)
    # against the sign of the query the smallest key wins; equal scores go to the earlier block
    assert listed(blocks(-q, k, choice))[0][5] == [0, 1, 4, 5]
    assert listed(blocks(0 * q, k, choice))[0][5] == [0, 1, 4, 5]
    # half of the softmax mass is in the block that scores 7; none but it is needed
    assert listed(blocks(q, k, Blocks(keep=1.0, top_p=0.5, block_q=1, block_k=1)))[0][5] == [0, 3, 4, 5]


def test_a_beam_misses_a_good_block_under_a_dull_parent_and_a_bound_does_not() -> None:
    """Keys 0 0 | 9 -9 | 1 1 | 0 0 in pairs: the pair of 9 and -9 has the mean 0, the pair of ones 1."""
    k = torch.tensor([0.0, 0.0, 9.0, -9.0, 1.0, 1.0, 0.0, 0.0, 0.0])[None, None, :, None]
    q = torch.ones(1, 1, 9, 1)
    shape = {"k": 4, "block_q": 1, "block_k": 1}
    assert listed(blocks(q, k, Blocks(**shape)))[0][8] == [0, 2, 7, 8]
    tree = Hierarchical(**shape, branching=2, width=1)
    assert tree.beam(8) == 3
    narrow = by_content.past_blocks(tree, 8, by_content.node_score(tree, [(q[0, 0, 8], k[0, 0])]))
    assert listed(hierarchical(q, k, tree))[0][8] == [*narrow, 8]
    bound = vary(tree, search="best_first")
    assert listed(hierarchical(q, k, bound))[0][8] == [0, 2, 7, 8]


PER_TOKEN = Hierarchical(k=16, block_q=1, block_k=64, branching=4)
PER_BLOCK = vary(PER_TOKEN, block_q=64)
MILLION = 2**20


def test_what_a_walk_scores_is_the_closed_form_at_every_length_to_a_million_tokens() -> None:
    """Without data: the walk takes any score, here one that hops through the nodes. A query behind c complete blocks
    scores the same whatever comes after it, so every c up to 2^20 / 64 is every length up to 2^20.
    """
    sums, last = [0] * 8, MILLION // 64 - 1
    for complete in range(last + 1):
        counted = by_content.walk(PER_BLOCK, complete, lambda level, node: node * 7919 % 1009)[1]
        closed = scored(PER_BLOCK, complete)
        assert counted == list(closed[: len(counted)])
        assert not any(closed[len(counted) :])
        sums = [a + b for a, b in zip(sums, [*counted, *[0] * (8 - len(counted))], strict=True)]
    for choice, tokens in ((PER_BLOCK, 1), (PER_TOKEN, 64)):
        whole = scored_in_all(choice, 0, MILLION)
        assert [tokens * number for number in sums[: len(whole)]] == list(whole)
    assert scored_in_all(vary(PER_TOKEN, k=17), 0, MILLION) != scored_in_all(PER_TOKEN, 0, MILLION)


@given(choices(search="beam", keep=None, k=7, width=None), st.integers(1, MILLION))
def test_a_search_of_a_fixed_number_is_logarithmic_and_the_flat_one_linear(choice: Hierarchical, complete: int) -> None:
    beam, branching = choice.beam(complete), choice.branching
    most = branching * beam + branching - 1
    levels = 2 + log(max(1.0, complete / beam)) / log(branching)
    assert sum(scored(choice, complete)) <= most * levels
    flat = Blocks(**{name: getattr(choice, name) for name in ("k", "top_p", "block_q", "block_k")})
    if complete > 7:
        assert scored(flat, complete) == (complete - 2,)


@given(st.one_of(choices(Blocks), choices(search="beam")), st.integers(0, 300), st.integers(1, 200))
@settings(max_examples=30)
def test_counts_of_pieces_add_up_and_are_those_of_single_queries(choice: Blocks, blocks_before: int, more: int) -> None:
    start = blocks_before * choice.block_q
    total = start + more
    rows = range(start // choice.block_q, (total - 1) // choice.block_q + 1)
    single = [scored(choice, row * choice.block_q // choice.block_k) for row in rows]
    assert sum(scored_in_all(choice, start, total)) == sum(map(sum, single))
    assert sum(number for _, number in repeats(choice, start, total)) == len(rows)


@given(choices(search="beam"), seeds, st.integers(1, 80))
@settings(max_examples=40)
def test_a_selection_states_the_closed_form_of_its_heads(choice: Hierarchical, seed: int, total: int) -> None:
    q, k = drawn(seed, total)
    found = choose(choice, q, k)
    heads = found.indices.shape[1]
    closed = [heads * number for number in scored_in_all(choice, 0, total)]
    assert sum(closed) == found.cost.scored == sum(found.cost.per_level)
    assert list(found.cost.per_level[: len(closed)]) == closed[: len(found.cost.per_level)]
    assert found.cost.computed >= found.cost.scored


@given(seeds, st.integers(0, 40), st.integers(1, 12), st.integers(0, 3))
def test_the_best_are_those_of_a_stable_sort(seed: int, width: int, most: int, values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(-values, values + 1, (20, width), generator=generator).float()
    score[torch.rand(score.shape, generator=generator) < 0.2] = float("-inf")
    number = torch.randint(0, most + 1, (20,), generator=generator)
    place, counted = best(score, number)
    for row, many, places, counts in zip(
        score.tolist(), number.tolist(), place.tolist(), counted.tolist(), strict=True
    ):
        candidates = [i for i in range(width) if row[i] > float("-inf")]
        expected = sorted(candidates, key=lambda i: (-row[i], i))[:many]
        assert {p for p, c in zip(places, counts, strict=True) if c} == set(expected)


def test_the_fewest_that_hold_a_mass() -> None:
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # 0.4, 0.3, 0.2, 0.1
    every = torch.ones(1, 4, dtype=torch.bool)
    assert fewest(score, every, 0.39).tolist() == [[True, False, False, False]]
    assert fewest(score, every, 0.69).tolist() == [[True, True, False, False]]
    assert fewest(score, every, 1.0).tolist() == [[True] * 4]


def test_scores_that_are_no_numbers_choose_nothing() -> None:
    q, k = drawn(0, 40)
    k[:, :, 12:16] = float("nan")
    for choice in (Blocks(k=5, block_q=2, block_k=2), Hierarchical(k=5, block_q=2, block_k=2, branching=2)):
        rows = listed(choose(choice, q, k))
        # blocks 6 and 7 are seen only where they are forced: as the own or the previous block
        assert all(not {6, 7} & set(row) for head in rows for row in head[9:])


def test_a_choice_by_content_keeps_no_graph_and_attends_with_gradients() -> None:
    q, k = (x.requires_grad_() for x in drawn(0, 40))
    selection = hierarchical(q, k, Hierarchical(k=4, block_q=2, block_k=2))
    assert selection.weights is None
    attend(q, k, k, selection).square().sum().backward()
    assert q.grad is not None
    assert bool((k.grad != 0).any())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"documents": [0, 3]}, r"documents=\[0, 3\]: must be multiples of 4"),
        ({"documents": [4]}, r"documents=\[4\]: must begin with 0"),
        ({"documents": [0, 8, 8]}, r"must begin with 0, ascend and end below S=20"),
        ({"documents": [0, 20]}, r"must begin with 0, ascend and end below S=20"),
        ({"documents": []}, r"documents=\[\]: must begin with 0"),
    ],
)
def test_documents_that_cannot_be_are_refused(options: dict[str, list[int]], message: str) -> None:
    q, k = drawn(0, 20)
    with pytest.raises(ValueError, match=message):
        blocks(q, k, Blocks(k=4, block_q=4, block_k=4), **options)


def test_queries_whose_block_began_earlier_are_refused() -> None:
    q, k = drawn(0, 20)
    with pytest.raises(ValueError, match=r"S - T=3: must be a multiple of block_q=4"):
        blocks(q[:, :, 3:], k, Blocks(k=4, block_q=4, block_k=4))
    with pytest.raises(ValueError, match=r"q.shape=\(.*, 0, .*\): must not be empty"):
        blocks(q[:, :, :0], k, Blocks(k=4, block_q=4, block_k=4))
    with pytest.raises(ValueError, match=r"S - T=4: must be 0 with more than one document"):
        blocks(q[:, :, 4:], k, Blocks(k=4, block_q=4, block_k=4), documents=[0, 8])
