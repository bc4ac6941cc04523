"""A block of queries chooses once: its later tokens see what a search would find for them, wherever a decoder goes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.attention import KeyValueCache, Selection, reference
from dsv3.attention.select import Index, leading, remember, select, unfinished
from dsv3.attention.select.latest import Latest
from dsv3.config import Blocks, Hierarchical, vary
from tests.attention.test_blocks import choices, choose, seeds
from tests.attention.variants import ATTENTIONS, config, hidden, module

LENGTH = 40
DEVICE = torch.device("cpu")


def lists(selection: Selection) -> list[list[int]]:
    """What the last position's row lists, for each sequence and head."""
    rows = zip(selection.indices[:, :, -1].flatten(0, 1).tolist(), selection.counts[:, :, -1].flatten(), strict=True)
    return [row[:count] for row, count in rows]


def tokens(seed: int, length: int) -> list[torch.Tensor]:
    """q and k of two sequences; scores of drawn numbers have no ties."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, length, 4, generator=generator, dtype=torch.float64) for n in (4, 2)]


@given(seeds, st.one_of(choices(Blocks), choices()), st.data())
@settings(max_examples=25)
def test_what_a_block_has_chosen_is_what_a_search_finds_from_any_earlier_length(
    seed: int, choice: Blocks, data: st.DataObject
) -> None:
    q, k = tokens(seed, LENGTH)
    index = Index.empty(choice, (2, 4, 2, 4), LENGTH, torch.float64)
    length, reached = 0, -1
    for turn in range(1, data.draw(st.integers(2, 4)) + 1):
        # other tokens from here on, over what was written before
        for x, other in zip((q, k), tokens(seed + turn, LENGTH), strict=True):
            x[:, :, length:] = other[:, :, length:]
        while length < LENGTH:
            start, length = length, min(LENGTH, length + data.draw(st.sampled_from([1, 1, 1, 1, 1, 2, 7])))
            new_q, new_k = q[:, :, start:length], k[:, :, unfinished(choice, start) : length]
            grown = remember(choice, new_q[:, :, leading(choice, start)], new_k, start, length, index)
            shape = (2, length - start)
            fresh = replace(grown, latest=Latest())
            found, again = (select(choice, shape, length, None, DEVICE, index=one, scale=0.5) for one in (grown, fresh))
            assert lists(found) == lists(again)
            assert found.cost.kept == again.cost.kept
            inside = start % choice.block_q > 0 and start // choice.block_q == (length - 1) // choice.block_q
            if inside and start == reached:
                assert found.cost.scored == found.cost.computed == 0
            reached = length
        whole = choose(choice, q, k, scale=0.5)
        seen = [
            reference.selected(s, heads=4, queries=n, total=LENGTH) for s, n in ((whole, LENGTH), (found, shape[1]))
        ]
        for sequence in range(2):
            for head in range(4):
                row, own = (one(sequence, head, LENGTH - 1) for one in seen)
                assert list(row) == list(own)
        length = data.draw(st.integers(0, LENGTH - 1))


def test_a_first_token_written_anew_chooses_anew_for_the_same_block() -> None:
    choice = Blocks(k=4, block_q=4, block_k=4)
    q, k = tokens(0, 40)
    index = Index.empty(choice, (2, 4, 2, 4), LENGTH, torch.float64)
    remember(choice, q[:, :, :36][:, :, leading(choice, 0)], k[:, :, :36], 0, 36, index)

    def decode(q: torch.Tensor, position: int) -> Selection | None:
        new = k[:, :, unfinished(choice, position) : position + 1]
        grown = remember(choice, q[:, :, leading(choice, position)], new, position, position + 1, index)
        return select(choice, (2, 1), position + 1, None, DEVICE, index=grown)

    one, later = q[:, :, 36:37], q[:, :, 37:38]
    found = [decode(x, at) for x, at in ((one, 36), (later, 37), (-one, 36), (later, 37), (one, 36))]
    first, after, other, after_other, back = (lists(x) for x in found if x is not None)
    assert first == after == back
    assert other == after_other
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("own", [1, 4])
def test_a_block_of_keys_that_begins_inside_a_block_of_queries_is_seen_from_there_on_and_not_after_going_back(
    own: int,
) -> None:
    choice = Blocks(k=own + 3, block_q=8, block_k=8 // own)
    q, k = tokens(0, LENGTH)
    index = Index.empty(choice, (2, 4, 2, 4), LENGTH, torch.float64)
    remember(choice, q[:, :, leading(choice, 0)], k, 0, 33, index)
    kept: list[Selection] = []
    for position in (*range(32, 40), 35, 36):
        new = k[:, :, unfinished(choice, position) : position + 1]
        grown = remember(
            choice,
            q[:, :, position : position + 1][:, :, leading(choice, position)],
            new,
            position,
            position + 1,
            index,
        )
        found = select(choice, (2, 1), position + 1, None, DEVICE, index=grown)
        assert found is not None
        begun = (position - 32) // choice.block_k + 1
        for row in lists(found):
            assert row[-begun:] == list(range(32 // choice.block_k, 32 // choice.block_k + begun))
            assert len(row) == 3 + begun
        kept.append(found)
    # what was handed out before is not written to
    assert [len(lists(one)[0]) for one in kept[:8]] == [3 + i // choice.block_k + 1 for i in range(8)]


@pytest.mark.parametrize("name", ["grouped", "latent"])
@pytest.mark.parametrize(
    "choice",
    [
        Blocks(k=5, block_q=4, block_k=4),
        Blocks(keep=0.6, top_p=0.7, block_q=8, block_k=2, sharing="group"),
        Hierarchical(k=5, block_q=4, block_k=2, branching=2, sharing="all"),
    ],
    ids=["flat", "share", "tree"],
)
def test_tokens_decoded_one_by_one_equal_the_whole_forward_with_a_search_per_block(name: str, choice: Blocks) -> None:
    model = config(ATTENTIONS[name], choice)
    made, x = module(model), hidden(37)
    cache, searches = KeyValueCache.empty(model, 2, 37, torch.float64), []
    with torch.no_grad():
        whole, _ = made(x)
        for i in range(37):
            out, selection = made(x[:, i : i + 1], cache=cache.layers[0])
            cache = cache.advance(1)
            searches.append(selection.cost.scored > 0)
            torch.testing.assert_close(out, whole[:, i : i + 1], rtol=1e-12, atol=1e-12)
    assert any(searches)
    assert not any(searched for i, searched in enumerate(searches) if i % choice.block_q)


def test_a_prompts_last_block_is_kept_without_the_lists_of_the_others() -> None:
    choice = Blocks(k=4, block_q=4, block_k=4)
    q, k = tokens(0, 35)
    index = Index.empty(choice, (2, 4, 2, 4), LENGTH, torch.float64)
    grown = remember(choice, q[:, :, leading(choice, 0)], k, 0, 35, index)
    select(choice, (2, 35), 35, None, DEVICE, index=grown)
    assert index.latest is not None
    latest = index.latest.choice
    assert latest is not None
    assert latest.block == 8
    assert latest.indices.untyped_storage().nbytes() == latest.indices.numel() * 8
    # a token that chooses for itself alone leaves nothing to keep
    alone = vary(choice, block_q=1)
    index = Index.empty(alone, (2, 4, 2, 4), LENGTH, torch.float64)
    select(alone, (2, 35), 35, None, DEVICE, index=remember(alone, q, k, 0, 35, index))
    assert index.latest is not None
    assert index.latest.choice is None
    # and a forward pass without a cache has nobody to keep for
    assert remember(choice, q[:, :, leading(choice, 0)], k, 0, 35).latest is None
