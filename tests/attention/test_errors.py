"""What users may get wrong is refused by name, with the remedy."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from jaxtyping import config as jaxtyping_config

from dsv3.attention import KeyValueCache, Selection, attend, build
from dsv3.attention.select import blocks, hierarchical, per_head, window
from dsv3.attention.sparse import LONGEST, sparse
from dsv3.config import Blocks, Everything, Hierarchical, MultiHead
from tests.attention.variants import ATTENTIONS, VARIANTS, config, hidden, module


@pytest.fixture(autouse=True)
def _shapes_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The annotations, where a test run checks them, would refuse wrong shapes before our own words do."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


def heads(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "q, k, v, message",
    [
        ((2, 4, 6), (1, 2, 4, 6), (1, 2, 4, 6), r"q.shape=\(2, 4, 6\): must be \[batch, heads, positions, width\]"),
        ((1, 2, 4, 6), (2, 2, 4, 6), (2, 2, 4, 6), "batch, keys and widths must agree"),
        ((1, 2, 4, 6), (1, 2, 4, 5), (1, 2, 4, 6), "batch, keys and widths must agree"),
        ((1, 2, 4, 6), (1, 2, 4, 6), (1, 2, 3, 6), "batch, keys and widths must agree"),
        ((1, 3, 4, 6), (1, 2, 4, 6), (1, 2, 4, 6), "key-value heads must divide the query heads"),
        ((1, 2, 5, 6), (1, 2, 4, 6), (1, 2, 4, 6), "T must be at most S"),
        (
            (1, 2, 0, 6),
            (1, 2, 4, 6),
            (1, 2, 4, 6),
            r"q.shape=\(1, 2, 0, 6\): must not be empty; make each axis at least 1",
        ),
        ((0, 2, 4, 6), (0, 2, 4, 6), (0, 2, 4, 6), r"q.shape=\(0, 2, 4, 6\): must not be empty"),
        ((1, 0, 4, 6), (1, 2, 4, 6), (1, 2, 4, 6), r"q.shape=\(1, 0, 4, 6\): must not be empty"),
        ((1, 2, 4, 6), (1, 0, 4, 6), (1, 0, 4, 6), r"k.shape=\(1, 0, 4, 6\): must not be empty"),
        ((1, 2, 4, 0), (1, 2, 4, 0), (1, 2, 4, 6), r"q.shape=\(1, 2, 4, 0\): must not be empty"),
        ((1, 2, 4, 6), (1, 2, 4, 6), (1, 2, 4, 0), r"v.shape=\(1, 2, 4, 0\): must not be empty"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attend(heads(*q), heads(*k), heads(*v))


@pytest.mark.parametrize(
    "choice",
    [
        Blocks(k=3, block_q=2, block_k=2),
        Blocks(keep=0.5, top_p=0.5, block_q=2, block_k=2, sharing="group"),
        Hierarchical(k=3, block_q=2, block_k=2, branching=2, sharing="all"),
        Hierarchical(k=3, block_q=2, block_k=2, branching=2, search="best_first"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "q, k, message",
    [
        (
            (2, 20, 6),
            (1, 2, 20, 6),
            r"q.shape=\(2, 20, 6\): must be \[batch, heads, positions, width\]; pass these axes",
        ),
        ((1, 2, 20, 6), (2, 20, 6), r"k.shape=\(2, 20, 6\): must be \[batch, heads, positions, width\]"),
        ((1, 2, 20, 6), (1, 2, 20, 5), r"\(q.shape, k.shape\)=.*widths must agree; pass \[B,H,T,P\] and \[B,G,S,P\]$"),
        ((1, 2, 20, 6), (2, 2, 20, 6), "batch, keys and widths must agree"),
        ((1, 3, 20, 6), (1, 2, 20, 6), "key-value heads must divide the query heads; group the heads evenly"),
        ((1, 2, 22, 6), (1, 2, 20, 6), "T must be at most S; pass the keys of all positions"),
        ((0, 2, 20, 6), (0, 2, 20, 6), r"q.shape=\(0, 2, 20, 6\): must not be empty; make each axis at least 1"),
        ((1, 0, 20, 6), (1, 2, 20, 6), "must not be empty"),
        ((1, 2, 20, 6), (1, 0, 20, 6), "must not be empty"),
        ((1, 2, 20, 0), (1, 2, 20, 0), "must not be empty"),
    ],
)
def test_shapes_that_cannot_be_searched_are_refused(
    choice: Blocks, q: tuple[int, ...], k: tuple[int, ...], message: str
) -> None:
    search: Callable[..., Selection] = hierarchical if isinstance(choice, Hierarchical) else blocks
    with pytest.raises(ValueError, match=message):
        search(heads(*q), heads(*k), choice)


def test_mixed_formats_are_refused_outside_autocast() -> None:
    q = heads(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"dtypes=.*: must be one outside autocast; convert them"):
        attend(q, q.double(), q)


@pytest.mark.parametrize(
    "selection, message",
    [
        (window(2, 5, 5, size=2), r"selection.indices.shape=\(2, 1, 1, 1\): must be \[1, h, 1, K\] for 5 queries"),
        (window(1, 5, 5, size=2, block_q=2), r"must be \[1, h, 3, K\]"),
        (per_head(torch.zeros(1, 2, 5), 5, k=2), r"h must be one of \[1, 3\]; select per head"),
        (window(1, 5, 6, size=2), r"selection.rank.shape=\(1, 1, 6\): must be \(1, 1, 5\)"),
    ],
)
def test_a_selection_for_other_shapes_is_refused(selection: Selection, message: str) -> None:
    q = heads(1, 3, 5, 4)
    if "3, K" in message:
        q = heads(1, 3, 6, 4)[:, :, 1:]
        selection = window(1, 3, 3, size=2, block_q=2)
    with pytest.raises(ValueError, match=message):
        attend(q, heads(1, 1, 5, 4), heads(1, 1, 5, 4), selection)


def test_lists_without_a_head_are_refused() -> None:
    q, selection = heads(1, 3, 5, 4), window(1, 5, 5, size=2)
    with pytest.raises(ValueError, match=r"selection.indices.shape=\(1, 1, 1\): must be \[1, h, 1, K\] for 5 queries"):
        attend(q, q, q, replace(selection, indices=selection.indices[0]))


@pytest.mark.parametrize(
    "part, shape, message",
    [
        ("counts", (1, 1, 2), r"selection.counts.shape=\(1, 1, 2\): must be \(1, 1, 1\); select for these keys"),
        ("counts", (1, 3, 1), r"selection.counts.shape=\(1, 3, 1\): must be \(1, 1, 1\)"),
        ("weights", (1, 1, 4), r"selection.weights.shape=\(1, 1, 4\): must be \(1, 1, 5\)"),
        ("weights", (1, 3, 5), r"selection.weights.shape=\(1, 3, 5\): must be \(1, 1, 5\)"),
    ],
)
@pytest.mark.parametrize("implementation", ["plain", None])
def test_parts_of_a_selection_that_do_not_fit_each_other_are_refused(
    part: str, shape: tuple[int, ...], message: str, implementation: str | None
) -> None:
    q, selection = heads(1, 3, 5, 16), window(1, 5, 5, size=2)
    whole = replace(selection, rank=None, limit=None, **{part: torch.zeros(shape, dtype=torch.long)})
    with pytest.raises(ValueError, match=message):
        attend(q, heads(1, 1, 5, 16), heads(1, 1, 5, 16), whole, implementation=implementation)


def test_more_positions_than_fp32_counts_are_refused() -> None:
    k = torch.empty(1, 1, LONGEST + 1, 1, device="meta")
    with pytest.raises(ValueError, match=f"positions={LONGEST + 1}: must be at most {LONGEST}"):
        sparse(k[:, :, :1], k, k, window(1, 1, 5, size=2), scale=1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 0}, "size=0: must be at least 1"),
        ({"size": 2, "sink": -1}, "sink=-1: must not be negative"),
        ({"size": 2, "block_q": 0}, "block_q=0: must be at least 1: a block holds a token; use longer blocks"),
        ({"size": 2, "block_q": -1}, "block_q=-1: must be at least 1"),
        ({"size": 2, "block_k": 0}, "block_k=0: must be at least 1"),
    ],
)
def test_a_window_of_nothing_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window(1, 5, 5, **arguments)


@pytest.mark.parametrize("queries", [0, 6])
def test_selectors_refuse_more_queries_than_tokens_and_none(queries: int) -> None:
    with pytest.raises(ValueError, match=f"queries={queries}: must be between 1 and total=5"):
        window(1, queries, 5, size=2)
    with pytest.raises(ValueError, match=f"queries={queries}: must be between 1 and S=5"):
        per_head(torch.zeros(1, 1, 5), queries, k=2)


@pytest.mark.parametrize("arguments", [{}, {"keep": 0.5, "k": 2}])
def test_per_head_keeps_a_share_or_a_number(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of the two is set"):
        per_head(torch.zeros(1, 1, 5), 5, **arguments)


@pytest.mark.parametrize("block_q", [0, -1])
def test_per_head_refuses_blocks_without_a_token(block_q: int) -> None:
    with pytest.raises(ValueError, match=f"block_q={block_q}: must be at least 1: a block holds a token"):
        per_head(torch.zeros(1, 1, 5), 5, k=2, block_q=block_q)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 5), r"importance.shape=\(2, 5\): must be \[batch, heads, positions\]; pass these axes"),
        ((1, 0, 5), r"importance.shape=\(1, 0, 5\): must not be empty"),
    ],
)
def test_per_head_refuses_another_shape(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_head(torch.zeros(shape), 5, k=2)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("batch, length", [(2, 0), (0, 3), (0, 40)])
def test_modules_refuse_no_tokens(name: str, batch: int, length: int) -> None:
    with pytest.raises(ValueError, match=rf"x.shape=\({batch}, {length}, 20\): must not be empty; make each axis at"):
        module(VARIANTS[name])(hidden(length, batch=batch))


@pytest.mark.parametrize("layer", [-1, 1])
def test_build_refuses_a_block_that_the_model_lacks(layer: int) -> None:
    model = config(MultiHead(num_attention_heads=1, head_dim=2), Everything())
    with pytest.raises(ValueError, match=rf"layer={layer}: the model has blocks 0 to 0"):
        build(model, layer)


def test_a_full_cache_and_a_cache_of_another_batch_are_refused() -> None:
    model = config(ATTENTIONS["latent"], Everything())
    made, cache = module(model), KeyValueCache.empty(model, 2, 5, torch.float64)
    with pytest.raises(ValueError, match=r"length=6: must be at most the cache's max_length=5; allocate a longer"):
        made(hidden(6), cache=cache.layers[0])
    with pytest.raises(ValueError, match=r"batch=3: must be the cache's 2"):
        made(hidden(4, batch=3), cache=cache.layers[0])


@pytest.mark.parametrize(
    "batch, length, message",
    [
        (0, 5, "batch=0: must be at least 1"),
        (1, 0, "max_length=0: must be between 1 and max_position_embeddings=1024"),
        (1, 1025, "max_length=1025: must be between 1 and max_position_embeddings=1024"),
    ],
)
def test_a_cache_of_impossible_size_is_refused(batch: int, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyValueCache.empty(config(ATTENTIONS["latent"], Everything()), batch, length)
