"""Lists that no selector of ours would make, to every implementation: out of order, empty, of nothing, out of range."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from bench.meters.memory import peak_bytes
from dsv3.attention import Selection, attend, query_blocks, reference
from dsv3.attention.select import per_head, window
from dsv3.attention.selection import union
from tests.attention.lists import SHAPES, by_cpu, by_each, close, draw, grads, needs_kernel, of_lists, select


def untidy(selection: Selection, future: int) -> Selection:
    """The lists backwards, the first block four times, a block of the future at most places that were free."""
    listed = torch.arange(selection.indices.shape[-1]) < selection.counts[..., None]
    first = selection.indices[..., :1].expand(-1, -1, -1, 3)
    indices = torch.cat((selection.indices.where(listed, torch.tensor(future)), first), dim=-1).flip(-1)
    return replace(selection, indices=indices, counts=torch.full_like(selection.counts, indices.shape[-1]))


@by_each
def test_the_order_of_a_list_repeats_and_blocks_of_the_future_change_no_bit(implementation: str) -> None:
    shape = (2, 2, 2, 2, 200, 200, 16, 16, 64, 32)
    leaves, selection = draw(shape), select(shape, keep=1.0)  # lists grow to the right
    found = []
    for one in (selection, untidy(selection, future=6)):
        out = attend(*leaves, one, implementation=implementation)
        found.append((out, *grads(out, leaves)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@by_each
def test_lists_out_of_order_let_no_later_token_through(implementation: str) -> None:
    shape = (1, 2, 2, 1, 100, 100, 16, 16, 64, 16)
    (q, k, v), selection = draw(shape), untidy(select(shape), future=6)
    one = attend(q, k, v, selection, implementation=implementation)
    k, v = (torch.cat((x[:, :, :37], 9 * x[:, :, 37:]), dim=2) for x in (k, v))
    two = attend(q, k, v, selection, implementation=implementation)
    assert torch.equal(one[:, :, :37], two[:, :, :37])
    assert not torch.equal(one, two)


@by_each
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_lists_may_be_empty_for_some_heads_or_for_all(implementation: str, heads: int) -> None:
    """What a query then sees is nothing; where it lists a block, it sees what the definition says."""
    shape = (2, 4, 2, heads, 190, 200, 16, 16, 64, 32)
    leaves = draw(shape)
    listed = torch.rand(2, heads, 3, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    listed[:, :, 1] = False  # for all heads
    listed[0, 0] = False  # a head without any list
    listed[..., 0] &= torch.arange(3)[:, None].eq(2).T  # the first queries begin before what they list
    selection = of_lists(listed, 64, 32)
    out = attend(*leaves, selection, implementation=implementation)
    theirs, seen = by_definition(leaves, shape, selection)
    assert not bool(seen.all())
    assert torch.equal(out[~seen], torch.zeros_like(out[~seen]))
    grad_q, grad_k, grad_v = grads(out, leaves)
    assert torch.equal(grad_q[~seen], torch.zeros_like(grad_q[~seen]))
    close(out, theirs, 1e-6)
    for mine, exact in zip((grad_q, grad_k, grad_v), grads(theirs, leaves), strict=True):
        close(mine, exact, 3e-6)


@by_each
def test_a_rule_per_token_may_leave_a_query_nothing(implementation: str) -> None:
    shape = (2, 2, 1, 2, 100, 100, 16, 16, 64, 16)
    leaves, selection = draw(shape), select(shape)
    rank = torch.arange(100).expand(2, 2, -1)
    limit = torch.full((2, 2, 100), -1)
    limit[:, 1, 50:] = 40
    ruled = replace(selection, rank=rank, limit=limit)
    out = attend(*leaves, ruled, implementation=implementation)
    theirs, seen = by_definition(leaves, shape, ruled)
    assert not bool(seen[:, 0].any())
    assert bool(seen[:, 1].any())
    assert bool((out[~seen] == 0).all())
    close(out, theirs, 1e-6)
    for mine, exact in zip(grads(out, leaves), grads(theirs, leaves), strict=True):
        close(mine, exact, 3e-6)


@by_each
def test_no_list_at_all_gives_zero(implementation: str) -> None:
    shape = (1, 1, 1, 1, 20, 20, 16, 16, 16, 16)
    leaves = draw(shape)
    nothing = of_lists(torch.zeros(1, 1, 2, 2, dtype=torch.bool), 16, 16)
    assert nothing.indices.shape[-1] == 0
    out = attend(*leaves, nothing, implementation=implementation)
    assert all(bool((x == 0).all()) for x in (out, *grads(out, leaves)))


@by_each
@pytest.mark.parametrize("wrong", [-1, 2, 2**32, -(2**32)])
def test_lists_that_name_no_block_are_refused(implementation: str, wrong: int) -> None:
    shape = (2, 1, 1, 1, 100, 100, 16, 16, 64, 64)
    leaves, selection = draw(shape), select(shape)
    bad = replace(selection, indices=torch.full_like(selection.indices, wrong))
    with pytest.raises(ValueError, match=r"indices.*: must be between 0 and 1, the last of the blocks of keys"):
        attend(*leaves, bad, implementation=implementation)


@by_each
@pytest.mark.parametrize("more", [9, -9, 2**32])
def test_counts_of_more_than_is_listed_are_refused(implementation: str, more: int) -> None:
    shape = (2, 1, 1, 1, 100, 100, 16, 16, 64, 64)
    leaves, selection = draw(shape), select(shape)
    with pytest.raises(ValueError, match=r"counts.*: must be between 0 and K=2"):
        attend(*leaves, replace(selection, counts=selection.counts + more), implementation=implementation)


@by_each
@pytest.mark.parametrize("size", [2**31, 2**40, 2**62])
def test_a_window_wider_than_any_sequence_is_dense_attention(implementation: str, size: int) -> None:
    shape = (1, 2, 2, 1, 100, 100, 16, 16, 64, 64)
    leaves = draw(shape)
    ours = attend(*leaves, window(1, 100, 100, size=size), implementation=implementation)
    close(ours, attend(*leaves), 1e-6)
    none = replace(window(1, 100, 100, size=5), limit=torch.full((1, 1, 100), -size))
    assert bool((attend(*leaves, none, implementation=implementation) == 0).all())


@by_each
def test_a_limit_below_every_rank_lets_nothing_through(implementation: str) -> None:
    """Also where fp32 would round one to the other."""
    shape = (1, 1, 1, 1, 20, 20, 16, 16, 64, 64)
    leaves, lowest = draw(shape), -(2**24)
    rank, limit = torch.full((1, 1, 20), lowest), torch.tensor([lowest - 1, lowest] * 10)[None, None]
    ruled = replace(window(1, 20, 20, size=5), rank=rank, limit=limit)
    out = attend(*leaves, ruled, implementation=implementation)
    assert (out != 0).any(dim=-1)[0, 0].tolist() == [False, True] * 10


@by_cpu
def test_ranks_that_cannot_be_compared_are_refused(implementation: str) -> None:
    """In fp32, or 32 bits; the Triton kernel compares 64."""
    shape = (1, 1, 1, 1, 20, 20, 16, 16, 64, 64)
    selection = window(1, 20, 20, size=5)
    assert selection.rank is not None
    with pytest.raises(ValueError, match=r"rank.*must be"):
        attend(*draw(shape), replace(selection, rank=selection.rank + 2**32), implementation=implementation)


@by_each
def test_a_value_that_is_no_number_stays_with_the_queries_that_are_computed_with_its_key(implementation: str) -> None:
    shape = (1, 1, 1, 1, 192, 192, 16, 16, 64, 64)
    q, k, v = (x.detach() for x in draw(shape))
    v[0, :, 40] = float("nan")
    found = attend(q, k, v, of_lists(torch.eye(3, dtype=torch.bool)[None, None], 64, 64), implementation=implementation)
    assert not bool(found[:, :, 64:].isnan().any())
    assert bool(found[:, :, 40:64].isnan().all())


@pytest.mark.parametrize("kind", ["projection", "cache", "odd rows", "every second number", "one row for all"])
def test_gathering_reads_any_strides(kind: str) -> None:
    shape = (2, 4, 2, 2, 100, 100, 18, 18, 16, 4)
    (q, *_), selection = draw(shape), select(shape)
    generator = torch.Generator().manual_seed(2)

    def one(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    views = {
        "projection": lambda: one(2, 100, 2, 18).transpose(1, 2),
        "cache": lambda: one(2, 2, 333, 18)[:, :, :100],
        "odd rows": lambda: one(2, 2, 100, 19)[..., 1:],
        "every second number": lambda: one(2, 2, 100, 37)[..., 1::2],
        "one row for all": lambda: one(1, 1, 100, 18).expand(2, 2, -1, -1),
    }
    k, v = (views[kind]().requires_grad_() for _ in range(2))
    ours = attend(q, k, v, selection, implementation="plain")
    theirs = attend(q, k.contiguous(), v.contiguous(), selection, implementation="plain")
    assert torch.equal(ours, theirs)
    assert all(torch.equal(*both) for both in zip(grads(ours, (q, k, v)), grads(theirs, (q, k, v)), strict=True))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("block_k", [1, 4])
def test_tokens_with_lists_of_their_own_are_computed_together_as_they_are_alone(
    heads: int, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are gathered at once: so tokens that come later, with longer lists, move no bit."""
    shape = (2, 4, 2, heads, 60, 70, 6, 5, 1, block_k)
    leaves, selection = draw(shape), select(shape)
    found = []
    for gathered in (1, 3000, query_blocks.GATHERED):
        monkeypatch.setattr(query_blocks, "GATHERED", gathered)
        out = attend(*leaves, selection, implementation="plain")
        found.append((out, *grads(out, leaves)))
    assert all(torch.equal(*both) for other in found[1:] for both in zip(found[0][:2], other[:2], strict=True))
    for both in zip(found[0][2:], found[2][2:], strict=True):
        torch.testing.assert_close(*both)  # sums over tokens, in an order of their own


@pytest.mark.parametrize("queries", [1, 512])
def test_gathering_from_a_cache_copies_no_more_than_is_listed(queries: int) -> None:
    """4096 keys in a cache that has room for more: a copy of them alone would be a quarter of a mebibyte a head."""
    importance = torch.randn(1, 4, 4096, generator=torch.Generator().manual_seed(0))

    def build() -> tuple[Tensor, Tensor, Selection]:
        memory = torch.randn(1, 4, 5000, 64)[:, :, :4096]
        return torch.randn(1, 4, queries, 64), memory, per_head(importance, queries, k=32, block_q=64)

    def call(built: tuple[Tensor, Tensor, Selection]) -> Tensor:
        q, memory, selection = built
        with torch.no_grad():
            return attend(q, memory, memory, selection, implementation="plain")

    peak = peak_bytes(build, call)[0].value
    assert peak < 4 * 4096 * 64 * 4


@needs_kernel
@pytest.mark.parametrize("heads, inverses", [(1, 1), (8, 0)])
def test_the_inverse_of_the_lists_is_memory_that_is_measured_and_many_heads_need_none(
    heads: int, inverses: int
) -> None:
    shape = (1, heads, 1, 1, 4096, 4096, 4, 4, 1, 4)  # so long that all other memory is small beside them
    selection = select(shape, keep=1.0)

    def build() -> tuple[tuple[Tensor, ...], Tensor]:
        leaves = draw(shape)
        return leaves, attend(*leaves, selection, implementation="kernel")

    peak = peak_bytes(build, lambda built: torch.autograd.grad(built[1].sum(), built[0], retain_graph=True))[0].value
    lists = 4 * selection.indices.numel()
    inverse = 4 * int(selection.counts.sum())
    assert lists + inverses * inverse <= peak < lists + (inverses + 0.5) * inverse


def by_definition(leaves: tuple[Tensor, ...], shape: tuple[int, ...], selection: Selection) -> tuple[Tensor, Tensor]:
    """The reference, zero where a query sees nothing; and which queries see a key, [B, H, T]."""
    batch, heads, _, _, queries, total, width, *_ = shape
    keys = reference.selected(selection, heads=heads, queries=queries, total=total)
    places = product(range(batch), range(heads), range(total - queries, total))
    seen = torch.tensor([len(keys(*at)) > 0 for at in places]).view(batch, heads, queries)
    out = reference.attention(*leaves, lambda *at: keys(*at) or [0], scale=width**-0.5)
    return torch.where(seen[..., None], out, 0.0), seen


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_key_value_head_hands_out_each_listed_key_once(shape: tuple[int, ...], rows: int) -> None:
    batch, heads, groups, shared, *_, total = shape[:6]
    selection, size = select(shape), shape[9]
    found = union(selection, groups, total, rows=rows)
    blocks = selection.counts.shape[2]
    assert found.shape == (batch, groups, -(-blocks // rows))
    for b in range(batch):
        for g in range(groups):
            for n in range(found.shape[2]):
                keys: set[int] = set()
                for head in range(g * heads // groups, (g + 1) * heads // groups):
                    listing = head * shared // heads
                    for row in range(n * rows, min((n + 1) * rows, blocks)):
                        count = int(selection.counts[b, listing, row])
                        for block in selection.indices[b, listing, row, :count].tolist():
                            keys |= set(range(block * size, min((block + 1) * size, total)))
                assert found[b, g, n] == len(keys)
