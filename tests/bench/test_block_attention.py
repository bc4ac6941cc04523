"""Arms of attention to blocks: each is checked against the reference, and a wrong one is found."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bench import block_attention, block_decoding
from bench.attention_sizes import BLOCK, BLOCK_ARMS, SEEN, WIDTH
from dsv3.attention import Selection, attend, reference, why_not_kernel

LENGTH = (SEEN + 3) * BLOCK


def test_every_arm_has_a_line_in_the_table_and_the_baseline_comes_first() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for phase in ("forward", "forward_backward"):
            arms = block_attention.arms(dtype, phase)
            assert arms[0] == "sdpa"
            assert set(arms) <= set(BLOCK_ARMS)
    assert set(block_attention.arms(torch.bfloat16, "forward")) == set(BLOCK_ARMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arm", [arm for arm in BLOCK_ARMS if arm != "flex"])
def test_every_arm_agrees_with_the_reference(arm: str, dtype: torch.dtype) -> None:
    given = block_attention.inputs(LENGTH, dtype, heads=2)
    if reason := block_attention.why_not(arm, given):
        pytest.skip(reason)
    block_attention.check(arm, given)


def seen(selection: Selection | None, head: int, position: int) -> int:
    """Keys that a query of a head sees."""
    if selection is None:
        return position + 1
    row, head = position // selection.block_q, head % selection.indices.shape[1]
    listed = selection.indices[0, head, row, : selection.counts[0, head, row]].tolist()
    return sum(min(selection.block_k, position + 1 - block * selection.block_k) for block in listed)


@pytest.mark.parametrize("arm", ["sdpa", "window", "hierarchical"])
def test_operations_are_the_products_of_pairs_that_are_seen(arm: str) -> None:
    given = block_attention.inputs(LENGTH + 5, torch.float32, heads=2)
    selection = block_attention.choose(arm, given)
    pairs = sum(seen(selection, head, position) for head in range(2) for position in range(LENGTH + 5))
    assert block_attention.operations(arm, given, "forward") == pairs * WIDTH * 2 * 2  # q . k and p v
    # backward: the scores anew, and gradients of v, p, q and k
    assert block_attention.operations(arm, given, "forward_backward") == pairs * WIDTH * 2 * (2 + 5)


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("arm", ["flash", "hierarchical", "window"])
def test_heads_that_share_keys_agree_with_plain_pytorch(arm: str, groups: int) -> None:
    given = block_attention.inputs(LENGTH + 5, torch.bfloat16, heads=4, groups=groups, width=16)
    assert [x.shape[1] for x in (given.q, given.k, given.v)] == [4, groups, groups]
    if reason := block_attention.why_not(arm, given):
        pytest.skip(reason)
    block_attention.check_heads(arm, given)


@pytest.mark.parametrize("wrong", ["output", "gradient", "late"])
def test_heads_that_compute_something_else_fail_their_check(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = block_attention.forward

    def off(arm: str, given: block_attention.Inputs) -> torch.Tensor:
        out = right(arm, given)
        if wrong == "gradient":
            return out + 0.1 * (given.k - given.k.detach()).sum()
        return out + (wrong == "output" or given.q.shape[2] == LENGTH)

    given = block_attention.inputs(LENGTH, torch.float32, heads=2, groups=1)
    block_attention.check_heads("flash", given)
    monkeypatch.setattr(block_attention, "forward", off)
    with pytest.raises(AssertionError, match="flash"):
        block_attention.check_heads("flash", given)


def test_a_kernel_that_torch_refuses_is_missing_and_any_other_error_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = block_attention.inputs(BLOCK, torch.bfloat16, heads=2, groups=1)
    found = {arm: block_attention.why_not(arm, given) for arm in block_attention.BACKENDS}
    assert found["flash"] is None
    assert "no such kernel" in str(found["cudnn"])  # on a CPU

    def out_of_memory(arm: str, given: block_attention.Inputs) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(block_attention, "forward", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        block_attention.why_not("flash", given)


def test_on_a_gpu_our_arms_are_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(block_attention, "attend", lambda *_, implementation: asked.append(implementation))
    monkeypatch.setattr(block_attention, "why_not_triton", lambda q: "no such GPU")
    with FakeTensorMode():
        q, k, v = (torch.zeros(1, 2, LENGTH, 8, device="cuda") for _ in range(3))
    given = block_attention.Inputs(q, k, v, (q, k, v))
    for arm in ("dense", "sdpa", "cudnn"):
        block_attention.forward(arm, given)
    assert asked == ["triton", "plain", "plain"]
    assert [block_attention.why_not(arm, given) for arm in ("dense", "sdpa")] == ["no such GPU", None]


def test_an_arm_that_misses_a_key_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_key_short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return attend(q, k, torch.cat((torch.zeros_like(v[:, :, :1]), v[:, :, 1:]), dim=2))

    monkeypatch.setattr(block_attention, "attend", one_key_short)
    with pytest.raises(AssertionError, match="sdpa"):
        block_attention.check("sdpa", block_attention.inputs(LENGTH, torch.float32, heads=2))


def test_the_window_is_the_last_blocks_and_counts_what_it_keeps() -> None:
    length = LENGTH - 5
    selection = block_attention.last_blocks(length)
    seen = reference.selected(selection, heads=1, queries=length, total=length)
    kept = 0
    for position in range(length):
        first = max(0, position // BLOCK - SEEN + 1) * BLOCK
        assert list(seen(0, 0, position)) == list(range(first, position + 1))
        kept += position + 1 - first
    assert selection.cost.kept == kept


def test_tokens_that_choose_for_themselves_agree_with_the_reference_and_an_error_is_seen() -> None:
    given, selection, out = block_attention.per_token(LENGTH + 7)
    assert block_attention.last_query_error(given, selection, out) < 1e-5
    assert block_attention.last_query_error(given, selection, out + 0.01) > 1e-3


@pytest.mark.parametrize("arm", block_decoding.ARMS)
def test_a_token_after_a_cache_attends_as_the_whole_forward_does(arm: str) -> None:
    reason = why_not_kernel(torch.zeros(1)) if arm == block_decoding.KERNEL else None
    if reason is not None:
        pytest.skip(reason)
    block_decoding.check(arm)


def test_a_token_that_sees_other_blocks_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def latest_blocks(arm: str, q: torch.Tensor, cache: block_decoding.Cache, position: int) -> Selection:
        found = chosen(arm, q, cache, position)
        assert found is not None
        return replace(found, indices=position // BLOCK - torch.arange(SEEN).expand_as(found.indices))

    chosen = block_decoding.chosen
    monkeypatch.setattr(block_decoding, "chosen", latest_blocks)
    with pytest.raises(AssertionError):
        block_decoding.check("blocks")


@pytest.mark.parametrize("batch", [1, 8])
def test_a_round_takes_every_place_of_a_block_once_and_the_caches_in_turn(batch: int) -> None:
    given = block_decoding.decoder(2 * BLOCK, batch)
    turns = given.turns()
    assert sorted(place for place, _ in turns) == list(range(block_decoding.ROUND))
    number = len(given.caches)
    for (_, one), (_, other) in pairwise(turns):
        assert one is not other
    assert all(turns[i][1] is turns[i + number][1] for i in range(block_decoding.ROUND - number))
    assert number * 2 * batch * 4 * SEEN * BLOCK * 64 * 4 >= block_decoding.COLD


def test_a_round_searches_once_where_a_block_chooses_and_for_every_token_where_tokens_do() -> None:
    given = block_decoding.decoder((SEEN + 3) * BLOCK, 1)
    for arm in block_decoding.CHOICES:
        scored = [
            block_decoding.chosen(arm, given.q[:, :, place : place + 1], cache, given.before + place)
            for place, cache in given.turns()
        ]
        searches = sum(one is not None and one.cost.scored > 0 for one in scored)
        assert searches == (block_decoding.ROUND if arm.endswith("per_token") else 1)
