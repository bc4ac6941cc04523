"""The reference against numbers worked by hand; the fast forms are tested against the reference elsewhere."""

import math

import pytest
import torch

from dsv3.attention import attend, eager, reference
from dsv3.attention.select import per_head, window
from dsv3.attention.select.order import kth_of_prefixes
from dsv3.attention.select.per_head import kept_tokens
from dsv3.config import Latent, Rope

# Two positions, width 1: q.k at (t, j) is [[0, .], [0, ln 3]]: weights 1 and then 1/4, 3/4.
Q = torch.tensor([[[[1.0], [1.0]]]])
K = torch.tensor([[[[0.0], [math.log(3.0)]]]])
V = torch.tensor([[[[4.0, 8.0], [0.0, 4.0]]]])


def test_reference_is_the_softmax_average_of_the_values_seen() -> None:
    out = reference.attention(Q, K, V, reference.everything, scale=1.0)
    torch.testing.assert_close(out, torch.tensor([[[[4.0, 8.0], [1.0, 5.0]]]], dtype=torch.float64))


def test_reference_adds_weights_to_the_logits() -> None:
    weights = torch.tensor([[[math.log(3.0), 0.0]]])
    out = reference.attention(Q, K, V, reference.everything, scale=1.0, weights=weights)
    torch.testing.assert_close(out[0, 0, 1], torch.tensor([2.0, 6.0], dtype=torch.float64))


def test_reference_scales_the_logits() -> None:
    out = reference.attention(Q, K, V, reference.everything, scale=2.0)
    torch.testing.assert_close(out[0, 0, 1], torch.tensor([0.4, 4.4], dtype=torch.float64))


@pytest.mark.parametrize("form", [attend, eager], ids=["attend", "eager"])
def test_fast_forms_have_the_numbers_worked_by_hand(form) -> None:
    torch.testing.assert_close(form(Q, K, V, scale=1.0), torch.tensor([[[[4.0, 8.0], [1.0, 5.0]]]]))


def test_a_window_with_a_sink_sees_the_first_and_the_last_keys() -> None:
    seen = reference.window(size=2, sink=1)
    assert [list(seen(0, 0, t)) for t in range(5)] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


def test_per_head_keeps_the_most_important_visible_keys_and_the_earlier_of_equals() -> None:
    seen = reference.per_head(torch.tensor([[[1.0, 5.0, 5.0, 7.0]]]), k=2)
    assert [list(seen(0, 0, t)) for t in range(4)] == [[0], [0, 1], [1, 2], [1, 3]]
    seen = reference.per_head(torch.tensor([[[1.0, 5.0, 5.0, 7.0]]]), keep=0.5)
    assert [list(seen(0, 0, t)) for t in range(4)] == [[0], [1], [1], [1, 3]]


def test_the_same_keys_come_out_of_the_selectors() -> None:
    importance = torch.tensor([[[1.0, 5.0, 5.0, 7.0]]])
    one = reference.selected(per_head(importance, 4, k=2, block_q=2), heads=1, queries=4, total=4)
    assert [list(one(0, 0, t)) for t in range(4)] == [[0], [0, 1], [1, 2], [1, 3]]
    two = reference.selected(window(1, 5, 5, size=2, sink=1, block_q=2, block_k=2), heads=1, queries=5, total=5)
    assert [list(two(0, 0, t)) for t in range(5)] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


def test_selected_reads_blocks_ranks_and_limits_as_defined() -> None:
    selection = window(1, 4, 4, size=2, block_q=4, block_k=2)
    assert selection.indices.tolist() == [[[[0, 1]]]]
    assert selection.counts.tolist() == [[[2]]]
    assert selection.rank.tolist() == [[[0, -1, -2, -3]]]
    assert selection.limit.tolist() == [[[1, 0, -1, -2]]]


def test_selection_counts_its_cost() -> None:
    # of 5 tokens the queries keep 1, 2, 3, 3, 3 keys with a window of 2 and a sink of 1
    cost = window(2, 5, 5, size=2, sink=1).cost
    assert (cost.scored, cost.kept) == (0, 2 * 12)
    # 2 sequences x 3 heads score 5 tokens each; half of 1..5 tokens, at least one: 1, 1, 1, 2, 2
    cost = per_head(torch.zeros(2, 3, 5), 5, keep=0.5).cost
    assert (cost.scored, cost.kept) == (2 * 3 * 5, 2 * 3 * 7)
    # the last two of them alone, two keys each
    cost = per_head(torch.zeros(2, 3, 5), 2, k=2).cost
    assert (cost.scored, cost.kept) == (2 * 3 * 2, 2 * 3 * 4)


def test_a_share_is_rounded_down_and_never_to_nothing() -> None:
    kept = kept_tokens(torch.tensor([1, 3, 4, 10, 20, 100]), keep=0.29)
    assert kept.tolist() == [1, 1, 1, 2, 5, 28]  # 0.29 * 100 is 28.999999999999996 in float64
    assert kept_tokens(torch.tensor([1, 3, 4, 10]), keep=1.0).tolist() == [1, 3, 4, 10]
    assert kept_tokens(torch.tensor([1, 3, 4, 10]), k=4).tolist() == [1, 3, 4, 4]


def test_the_kth_smallest_of_prefixes() -> None:
    row = torch.tensor([[[3, 0, 4, 1, 2]]])
    lengths, places = torch.tensor([1, 2, 2, 3, 5, 5]), torch.tensor([0, 0, 1, 2, 0, 3])
    assert kth_of_prefixes(row, lengths, places).tolist() == [[[3, 0, 3, 4, 0, 3]]]


def test_rotation_of_the_reference_turns_pairs() -> None:
    turned = reference.rotate(torch.tensor([1.0, 0.0], dtype=torch.float64), 2, torch.tensor([math.pi / 4]))
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-7, rtol=0)


def test_latent_reference_of_one_token_is_its_value_projected() -> None:
    """A single token sees itself alone, so whatever its logits, its value comes out: o_proj kv_b[v] RMS(kv_a x)."""
    shape = Latent(
        num_attention_heads=1, q_lora_rank=None, kv_lora_rank=2, qk_nope_head_dim=1, qk_rope_head_dim=2, v_head_dim=1
    )
    weights = {
        "q_proj.weight": torch.ones(3, 2),
        "kv_a_proj_with_mqa.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]),
        "kv_a_layernorm.weight": torch.tensor([1.0, 2.0]),
        "kv_b_proj.weight": torch.tensor([[9.0, 9.0], [1.0, 1.0]]),
        "o_proj.weight": torch.tensor([[1.0], [10.0]]),
    }
    double = {name: weight.double() for name, weight in weights.items()}
    out = reference.latent(torch.tensor([[[3.0, 4.0]]]), double, shape, Rope(), reference.everything)
    # RMS([3, 4]) = [3, 4] / sqrt(12.5), weighted [3, 8] / sqrt(12.5), summed 11 / sqrt(12.5)
    value = 11 / math.sqrt(12.5)
    torch.testing.assert_close(out, torch.tensor([[[value, 10 * value]]], dtype=torch.float64), rtol=1e-6, atol=0)
