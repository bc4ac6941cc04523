"""The lightning indexer: its choice against sorting, its inputs, its cache, and what it must not touch."""

from importlib import import_module

import pytest
import torch

from dsv3.attention import KeyValueCache, attend, reference
from dsv3.attention.select import indexer
from dsv3.attention.select.indexer import everything
from dsv3.attention.select.reference import indexed
from dsv3.config import Everything, Float8Block, vary
from dsv3.precision import apply
from tests.attention.test_contract import FLOAT64
from tests.attention.variants import INDEXER, LATENT, VARIANTS, config, hidden, module

SCORES = import_module("dsv3.attention.select.scores")
MODEL = VARIANTS["latent-indexer"]


def drawn(queries: int, total: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers: scores are exact and often equal, 0 above all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, queries, 3, 4), (2, queries, 3), (2, total, 4)
    q, weight, k = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    return q, weight, k


def by_pairs(q: torch.Tensor, weight: torch.Tensor, k: torch.Tensor) -> list[list[list[float]]]:
    """Scores of all positions by their definition; positions before the first query have none."""
    products = torch.einsum("btjw,bsw->btjs", q.double(), k.double())
    score = (weight.double()[..., None] * products.clamp(min=0)).sum(dim=2)
    return torch.nn.functional.pad(score, (0, 0, k.shape[1] - q.shape[1], 0)).tolist()


@pytest.mark.parametrize("queries, total", [(1, 1), (7, 7), (8, 8), (63, 63), (17, 63), (1, 63), (5, 9)])
@pytest.mark.parametrize("chunk", [1, 500, SCORES.CHUNK])
def test_exactly_the_best_keys_are_seen_the_earlier_of_equals(
    queries: int, total: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SCORES, "CHUNK", chunk)
    q, weight, k = drawn(queries, total)
    selection = indexer(q, weight, k, topk=7)
    found = reference.selected(selection, heads=4, queries=queries, total=total)
    expected = indexed(by_pairs(q, weight, k), 7)
    kept = 0
    for b in range(2):
        for t in range(total - queries, total):
            keys = list(found(b, 0, t))
            assert keys == list(expected(b, 0, t)) == list(found(b, 3, t))
            kept += len(keys)
    assert selection.cost.kept == kept
    scored = sum(t + 1 for t in range(total - queries, total) if t >= 7)
    assert selection.cost.scored == 2 * scored
    assert selection.cost.per_level == (2 * scored,)


def test_a_hadamard_matrix_on_queries_and_keys_changes_no_score() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 5, 3, 4), (1, 5, 3), (1, 9, 4)
    q, weight, k = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = torch.kron(two, two) / 2
    turned = SCORES.index_scores(q @ hadamard, weight, k @ hadamard)
    torch.testing.assert_close(turned, SCORES.index_scores(q, weight, k), rtol=FLOAT64, atol=FLOAT64)


def test_scores_are_computed_in_fp32_at_least() -> None:
    q, weight, k = (x.bfloat16() / 3 for x in drawn(9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        score = SCORES.index_scores(q, weight, k)
    assert score.dtype == torch.float32
    assert torch.equal(score, SCORES.index_scores(q.float(), weight.float(), k.float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_takes_no_key_from_a_token(bad: float) -> None:
    q, weight, k = drawn(20, 20)
    k[:, 3] = bad
    selection = indexer(q, weight, k, topk=7)
    assert bool((selection.indices[:, :, 7:].diff(dim=-1) > 0).all())
    assert bool((selection.indices[:, :, 7:] <= torch.arange(7, 20)[:, None]).all())
    assert selection.counts[0, 0].tolist() == [min(t + 1, 7) for t in range(20)]


def test_tokens_that_see_everything_attend_as_dense_attention_does_bit_for_bit() -> None:
    made, x = module(config(LATENT, vary(INDEXER, index_topk=40)), torch.float32), hidden(40, dtype=torch.float32)
    dense = module(config(LATENT, Everything()), torch.float32)
    dense.load_state_dict({name: weight for name, weight in made.state_dict().items() if "indexer" not in name})
    out, selection = made(x)
    assert torch.equal(out, dense(x)[0])
    assert selection.cost.scored == 0
    found = reference.selected(selection, heads=4, queries=40, total=40)
    assert all(list(found(1, h, t)) == list(range(t + 1)) for h in range(4) for t in range(40))


def test_what_it_selects_without_pruning_is_dense_attention_too() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    selection = everything(2, 9, 9, q.device)
    torch.testing.assert_close(attend(q, k, v, selection), attend(q, k, v), rtol=FLOAT64, atol=FLOAT64)


def test_absorbed_latent_attention_equals_the_expanded_form() -> None:
    made, x = module(MODEL), hidden(63)
    torch.testing.assert_close(made(x, absorbed=True)[0], made(x, absorbed=False)[0], rtol=FLOAT64, atol=FLOAT64)


def test_prefill_and_decoding_remember_and_select_the_same_bit_for_bit() -> None:
    """Computed in float64, compared in float32: what another order of summation moves lies far below its last bit."""
    made, x = module(MODEL), hidden(61)
    held = []
    for pieces in ([61], [40, 11, *[1] * 10], [1] * 61):
        cache, selected = KeyValueCache.empty(MODEL, 2, 61, torch.float64), []
        with torch.no_grad():
            for part in x.split(pieces, dim=1):
                selected.append(made(part, cache=cache.layers[0])[1])
                cache = cache.advance(part.shape[1])
        held.append((cache.layers[0].buffers["index_key"].float(), _listed(selected)))
    for keys, listed in held[1:]:
        assert torch.equal(keys, held[0][0])
        assert listed == held[0][1]


def _listed(selections: list) -> list[list[int]]:
    """The keys that each token of the first sequence sees."""
    listed, start = [], 0
    for selection in selections:
        queries = selection.counts.shape[2] if selection.block_q == 1 else selection.block_q
        found = reference.selected(selection, heads=4, queries=queries, total=start + queries)
        listed += [list(found(0, 0, t)) for t in range(start, start + queries)]
        start += queries
    return listed


def test_nothing_but_its_own_loss_teaches_an_indexer_and_it_teaches_nothing_else() -> None:
    made = module(MODEL)
    made(hidden(31))[0].square().sum().backward()
    learns = {name for name, p in made.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in made.named_parameters() if not name.startswith("indexer.")}


def test_autocast_runs_attention_in_its_format() -> None:
    made, x = module(MODEL, torch.float32), hidden(40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = made(x)
    assert out.dtype == torch.bfloat16
    # bf16 keeps 8 bits: six products of about 20 terms follow each other. A choice of 5 keys that tips over at a
    # near-tie moves its token further, so the bound is on the bulk
    difference = (out - made(x)[0]).float().abs().median()
    assert difference < 0.05 * made(x)[0].abs().median()


def test_head_weights_stay_off_fp8_codes_as_published() -> None:
    made = module(MODEL, torch.float32)
    scope = apply(made, Float8Block())
    assert "indexer.weights_proj" in scope.kept
    assert {"indexer.wq_b", "indexer.wk"} <= set(scope.on_codes)


@pytest.mark.parametrize(
    "queries, total, topk, says",
    [(0, 5, 2, "queries=0: must be between 1 and S=5"), (6, 5, 2, "queries=6"), (5, 5, 0, "topk=0: must be at least")],
)
def test_what_cannot_be_selected_is_refused(queries: int, total: int, topk: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        indexer(*drawn(queries, total), topk=topk)


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize("topk", [4, 50])
@pytest.mark.parametrize(
    "q, weight, k, says",
    [
        ((0, 40, 3, 4), (0, 40, 3), (0, 40, 4), "must not be empty; make each axis at least 1"),
        ((1, 40, 0, 4), (1, 40, 0), (1, 40, 4), "must not be empty"),
        ((40, 3, 4), (40, 3), (40, 4), r"must agree; pass \[B,T,J,W\], \[B,T,J\] and \[B,S,W\]"),
        ((1, 40, 3, 4), (1, 40, 2), (1, 40, 4), "batch, queries, heads and widths must agree"),
        ((1, 40, 3, 4), (1, 40, 3), (1, 40, 5), "batch, queries, heads and widths must agree"),
        ((1, 40, 3, 4), (1, 40, 3), (2, 40, 4), "batch, queries, heads and widths must agree"),
    ],
)
def test_shapes_that_cannot_be_indexed_are_refused(
    q: tuple[int, ...], weight: tuple[int, ...], k: tuple[int, ...], says: str, topk: int
) -> None:
    with pytest.raises(ValueError, match=rf"^\(q.shape, weight.shape, k.shape\)=.*{says}"):
        indexer(torch.zeros(q), torch.zeros(weight), torch.zeros(k), topk=topk)
