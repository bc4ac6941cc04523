"""Everything before a crossover, a tree's blocks behind it: by position, with the crossover that was measured."""

import sys
from dataclasses import fields

import pytest
import torch

from dsv3.attention import KeyValueCache, reference
from dsv3.attention.kernels import blocks as kernel
from dsv3.attention.select import auto, hierarchical
from dsv3.attention.select.auto import UNMEASURED
from dsv3.config import Auto, Hierarchical
from dsv3.config.counts import scored_in_all
from tests.attention.variants import ATTENTIONS, config, hidden, module

TREE = {"k": 6, "block_q": 4, "block_k": 2, "branching": 2}
CROSSOVER = 32


@pytest.mark.parametrize("block_q, block_k", [(4, 2), (2, 4), (1, 1)])
@pytest.mark.parametrize("search", ["beam", "best_first"])
def test_a_query_sees_everything_before_the_crossover_and_its_tree_behind_it(
    block_q: int, block_k: int, search: str
) -> None:
    sizes = {"k": 6, "block_q": block_q, "block_k": block_k, "branching": 2, "search": search}
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 61, 4, generator=generator) for _ in range(2))
    found, tree = hierarchical(q, k, Auto(**sizes, crossover=CROSSOVER)), hierarchical(q, k, Hierarchical(**sizes))
    ours, theirs = (reference.selected(each, heads=2, queries=61, total=61) for each in (found, tree))
    for head in range(2):
        for position in range(61):
            everything = list(range(position + 1))
            assert list(ours(0, head, position)) == (
                everything if position < CROSSOVER else list(theirs(0, head, position))
            )
        assert len(list(theirs(0, head, 60))) < 61
    assert 0 < found.cost.scored < tree.cost.scored
    if search == "beam":
        assert found.cost.scored == 2 * sum(scored_in_all(Auto(**sizes, crossover=CROSSOVER), 0, 61))
    assert found.indices.shape[-1] == CROSSOVER // block_k


def test_attention_is_dense_until_a_query_lies_behind_the_crossover() -> None:
    model = config(ATTENTIONS["grouped"], Auto(**TREE, crossover=CROSSOVER))
    made, x = module(model), hidden(CROSSOVER + 3)
    assert made(x[:, :CROSSOVER])[1] is None
    assert made(x)[1] is not None
    cache, selections = KeyValueCache.empty(model, 2, CROSSOVER + 3, torch.float64), []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            selections.append(made(token, cache=cache.layers[0])[1])
            cache = cache.advance(1)
    assert [selection is None for selection in selections] == [True] * CROSSOVER + [False] * 3


def test_the_crossover_is_the_measured_one_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"instructions": "fast", "dtype": "bfloat16", "direction": "training", "length": 100}
    monkeypatch.setattr(kernel, "why_not", lambda: None)
    monkeypatch.setattr(kernel, "instruction_sets", lambda: ("fast", "slow"))
    monkeypatch.setattr(sys.modules[auto.__module__], "rows", lambda: [row])
    tree = Hierarchical(k=7, block_q=16, block_k=32, branching=3, search="best_first", width=9, rotated=False)
    found = auto(tree, torch.bfloat16, "training")
    assert found.crossover == 128
    assert {field.name: getattr(found, field.name) for field in fields(tree)} == vars(tree)
    for other in (auto(tree, torch.bfloat16, "forward"), auto(tree, torch.float32, "training")):
        assert other.crossover == UNMEASURED
    monkeypatch.setattr(kernel, "instruction_sets", lambda: ("slow",))
    assert auto(tree, torch.bfloat16, "training").crossover == UNMEASURED
    monkeypatch.setattr(kernel, "why_not", lambda: "no compiler")
    assert auto(tree, torch.bfloat16, "training").crossover == UNMEASURED
