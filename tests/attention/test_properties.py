"""What holds for all sizes, scores and selections."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.attention import attend, reference
from dsv3.attention.select import per_head, window
from dsv3.attention.select.order import kth_of_prefixes
from dsv3.attention.select.window import clipped_sum
from dsv3.config import PerHead, Select, Window
from tests.attention.variants import chosen, seen

seeds = st.integers(0, 2**31)
selects = st.one_of(
    st.builds(Window, size=st.integers(1, 30), sink=st.integers(0, 30)),
    st.builds(PerHead, keep=st.floats(0.01, 1.0)),
    st.builds(PerHead, k=st.integers(1, 40)),
)


@given(seeds, selects, st.integers(1, 60), st.integers(0, 40), st.integers(1, 70))
@settings(max_examples=60)
def test_attention_over_any_selection_equals_the_reference(
    seed: int, select: Select, queries: int, before: int, block_q: int
) -> None:
    generator, total = torch.Generator().manual_seed(seed), before + queries
    q = torch.randn(1, 2, queries, 3, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 1, total, 3, generator=generator, dtype=torch.float64)
    importance = torch.randint(-3, 4, (1, 2, total), generator=generator).double()
    weights = importance if isinstance(select, PerHead) else None
    ours = attend(q, k, v, chosen(select, importance, queries, block_q), scale=0.8)
    theirs = reference.attention(q, k, v, seen(select, importance), scale=0.8, weights=weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(seeds, selects, st.integers(2, 80), st.integers(1, 40), st.data())
@settings(max_examples=60)
def test_no_later_score_changes_what_a_query_sees(
    seed: int, select: Select, total: int, block_q: int, data: st.DataObject
) -> None:
    """The candidates of a block, and their order, are decided by earlier tokens too: so are the bits of its output."""
    cut = data.draw(st.integers(1, total - 1))
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(-3, 4, (1, 2, total), generator=generator).float()
    changed = importance.clone()
    changed[..., cut:] = torch.randint(-9, 10, (1, 2, total - cut), generator=generator).float()
    one, other = (chosen(select, scores, total, block_q) for scores in (importance, changed))
    assert one is not None
    assert other is not None
    now, then = (reference.selected(s, heads=2, queries=total, total=total) for s in (one, other))
    for head in range(2):
        assert all(list(now(0, head, t)) == list(then(0, head, t)) for t in range(cut))
    whole = cut // block_q
    assert torch.equal(one.counts[:, :, :whole], other.counts[:, :, :whole])
    listed = torch.arange(one.indices.shape[-1]) < one.counts[..., None]
    assert torch.equal((one.indices * listed)[:, :, :whole], (other.indices * listed)[:, :, :whole])


@given(seeds, selects, st.integers(1, 60), st.integers(1, 40), st.data())
@settings(max_examples=40)
def test_later_queries_alone_see_what_they_see_among_all(
    seed: int, select: Select, total: int, block_q: int, data: st.DataObject
) -> None:
    """Decoding selects for the last queries only; a full forward selects for all."""
    queries = data.draw(st.integers(1, total))
    importance = torch.randint(-3, 4, (1, 2, total), generator=torch.Generator().manual_seed(seed)).float()
    every, last = chosen(select, importance, total, block_q), chosen(select, importance, queries, block_q)
    assert every is not None
    assert last is not None
    full = reference.selected(every, heads=2, queries=total, total=total)
    part = reference.selected(last, heads=2, queries=queries, total=total)
    for head in range(2):
        assert all(list(full(0, head, t)) == list(part(0, head, t)) for t in range(total - queries, total))


@given(seeds, st.integers(1, 70), st.data())
@settings(max_examples=60)
def test_the_kth_of_a_prefix_is_that_of_sorting_it(seed: int, total: int, data: st.DataObject) -> None:
    row = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    lengths = data.draw(st.lists(st.integers(1, total), min_size=1, max_size=9))
    places = [data.draw(st.integers(0, length - 1)) for length in lengths]
    found = kth_of_prefixes(row[None, None], torch.tensor(lengths), torch.tensor(places))
    expected = [int(row[:length].sort().values[place]) for length, place in zip(lengths, places, strict=True)]
    assert found.tolist() == [[expected]]


@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 300))
def test_a_clipped_sum_is_the_sum_of_clipped_numbers(first: int, more: int, most: int) -> None:
    assert clipped_sum(first, first + more, most) == sum(min(u, most) for u in range(first, first + more + 1))


@given(seeds, st.integers(1, 6), st.integers(1, 50))
@settings(max_examples=30)
def test_adding_a_constant_to_the_scores_of_a_head_changes_nothing(seed: int, k: int, total: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, key, v = torch.randn(3, 1, 2, total, 4, generator=generator, dtype=torch.float64)
    importance = torch.randint(-3, 4, (1, 2, total), generator=generator).double()
    one = attend(q, key, v, per_head(importance, total, k=k))
    other = attend(q, key, v, per_head(importance + 2.0, total, k=k))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 70))
@settings(max_examples=30)
def test_block_sizes_change_only_rounding(seed: int, size: int, block: int, total: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, total, 4, generator=generator, dtype=torch.float64)
    one = attend(q, k, v, window(1, total, total, size=size))
    other = attend(q, k, v, window(1, total, total, size=size, block_q=block, block_k=block))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
