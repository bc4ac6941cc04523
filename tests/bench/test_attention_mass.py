"""How much of attention's weight a choice catches: by brute force, and what must be so of the floor and the ceiling."""

import pytest
import torch

from bench.attention_mass import attended, masses
from dsv3.attention.select import reference
from dsv3.config import Blocks, Everything, Model, MultiHead
from dsv3.model import Transformer

SIZE = 4
CHOICE = Blocks(k=6, block_q=SIZE, block_k=SIZE)


def drawn(length: int, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return 3 * q, k


def by_hand(q: torch.Tensor, k: torch.Tensor, chosen: dict[tuple[int, int], set[int]]) -> tuple[float, float]:
    """Means over queries of the weight on free chosen blocks by that on all free ones, and of that on all seen."""
    free, seen = [], []
    heads, length = q.shape[1:3]
    for head in range(heads):
        for t in range(length):
            own = t // SIZE
            weight = (q[0, head, t] @ k[0, head, : t + 1].T * 0.5).softmax(-1)
            mass = [weight[j * SIZE : (j + 1) * SIZE].sum().item() for j in range(own + 1)]
            forced = {0, own, own - 1} & set(range(own + 1))
            could = set(range(own)) - forced
            listed = chosen[head, own]
            seen.append(sum(mass[j] for j in listed | forced))
            if could:
                free.append(sum(mass[j] for j in listed & could) / sum(mass[j] for j in could))
    return sum(free) / len(free), sum(seen) / len(seen)


def test_the_flat_choice_catches_what_a_loop_over_queries_says() -> None:
    q, k = drawn(48)
    seen = reference.content(CHOICE, q, k)
    chosen = {(head, row): {key // SIZE for key in seen(0, head, row * SIZE)} for head in range(2) for row in range(12)}
    found = masses(q, k, CHOICE, scale=0.5, seed=0)["blocks"]
    assert found == pytest.approx(by_hand(q, k, chosen), abs=1e-12)  # float64 sums of 48 terms


def test_no_choice_catches_more_than_the_best_and_none_less_than_nothing() -> None:
    q, k = drawn(64)
    found = masses(q, k, CHOICE, scale=0.5, seed=0)
    assert found["forced"][0] == 0.0
    assert 0.0 < found["forced"][1] < found["random"][1]
    for arm in ("blocks", "hierarchical", "best_first", "random"):
        assert 0.0 < found[arm][0] < found["oracle"][0] < 1.0
        assert found["forced"][1] < found[arm][1] < found["oracle"][1]
    assert found["blocks"][0] > found["random"][0]


def test_a_choice_of_all_blocks_catches_everything() -> None:
    q, k = drawn(32)
    found = masses(q, k, Blocks(k=20, block_q=SIZE, block_k=SIZE), scale=0.5, seed=0)
    assert {arm: pair for arm, pair in found.items() if arm != "forced"} == {
        arm: pytest.approx((1.0, 1.0)) for arm in ("blocks", "hierarchical", "best_first", "random", "oracle")
    }


def test_the_queries_and_keys_of_every_layer_are_those_that_attention_multiplied() -> None:
    shape = MultiHead(num_attention_heads=2, head_dim=8, select=Everything())
    config = Model(vocab_size=11, hidden_size=16, num_hidden_layers=3, intermediate_size=16, attention=shape)
    calls = attended(Transformer(config), torch.arange(9))
    assert [(q.shape, k.shape, scale) for q, k, scale in calls] == [((1, 2, 9, 8), (1, 2, 9, 8), 8**-0.5)] * 3
    assert not torch.equal(calls[0][0], calls[1][0])
