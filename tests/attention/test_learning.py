"""How a choice of blocks learns: its bias and its loss against loops, what reaches what, and what entmax leaves out."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.attention import KeyValueCache, MultiHeadAttention
from dsv3.attention.select import Compared, leading, remember, select, taught, weighed
from dsv3.attention.select import learning as ways
from dsv3.attention.select.block_scores import block_scores
from dsv3.attention.select.reference_learning import distilled, entmax
from dsv3.attention.sparse import pairs
from dsv3.config import Blocks, vary
from tests.attention.test_contract import FLOAT64
from tests.attention.test_distillation import Largest
from tests.attention.variants import ATTENTIONS, LEARNING, config, hidden, module

SCORES = import_module("dsv3.attention.select.scores")
QUERY_BLOCKS = import_module("dsv3.attention.query_blocks")
DISTILLED = LEARNING["distilled"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def chosen(choice: Blocks, q: Tensor, k: Tensor, scale: float = 0.7):
    """The selection of all positions, and what was compared, with gradient."""
    total, batch = k.shape[2], len(q)
    index = remember(choice, q.detach()[:, :, leading(choice, 0)], k.detach(), 0, total)
    selection = select(choice, (batch, total), total, None, q.device, index=index, scale=scale)
    return selection, Compared.of(choice, q[:, :, leading(choice, 0)], k)


@pytest.mark.parametrize("sharing", ["head", "group", "all"])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length, block_q, block_k", [(1, 1, 2), (5, 4, 2), (22, 4, 2), (17, 1, 2), (23, 2, 4)])
@pytest.mark.parametrize("chunk", [1, SCORES.CHUNK])
def test_the_loss_and_its_gradients_are_those_of_the_definition(
    sharing: str, heads: int, groups: int, length: int, block_q: int, block_k: int, chunk: int, monkeypatch
) -> None:
    monkeypatch.setattr(SCORES, "CHUNK", chunk)
    choice = vary(DISTILLED, sharing=sharing, block_q=block_q, block_k=block_k, k=5)
    compared = draw(2, heads, length, 6), draw(2, groups, length, 6, seed=1)
    attended = draw(2, heads, length, 4, seed=2), draw(2, groups, length, 4, seed=3)
    ours = taught(choice, *chosen(choice, *compared), attended, 0.7).loss
    theirs = distilled(choice, compared, attended, scale=0.7)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)
    if theirs.requires_grad:
        grads = (torch.autograd.grad(3 * loss, compared) for loss in (ours, theirs))
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("chunk", [1, SCORES.CHUNK])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_of_block_scores_are_those_of_finite_differences(groups: int, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(SCORES, "CHUNK", chunk)
    leaders, means = draw(2, 4, 5, 3), draw(2, groups, 7, 3, seed=1)
    indices = torch.randint(7, (2, 4, 5, 6), generator=torch.Generator().manual_seed(0))  # some blocks twice
    assert torch.autograd.gradcheck(lambda *leaves: block_scores(*leaves, indices), (leaders, means), fast_mode=False)
    whole = torch.einsum("bhnw,bhmw->bhnm", leaders, means.repeat_interleave(4 // groups, dim=1))
    torch.testing.assert_close(block_scores(leaders, means, indices), whole.gather(-1, indices), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("name", ["distilled", "distilled_per_token"])
@pytest.mark.parametrize("attention", ["multi_head", "grouped"])
def test_the_loss_teaches_queries_and_keys_and_changes_no_output(attention: str, name: str) -> None:
    choice, x = LEARNING[name], hidden(31)
    made = module(config(ATTENTIONS[attention], choice))
    plain = module(config(ATTENTIONS[attention], vary(choice, learns="nothing")))
    (out, selection), (other, _) = made(x), plain(x)
    assert torch.equal(out, other)
    selection.loss.backward()
    learns = {name for name, p in made.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert learns == {"q_proj.weight", "k_proj.weight"}


def test_there_is_a_loss_only_in_training() -> None:
    model = config(ATTENTIONS["grouped"], DISTILLED)
    made, x = module(model), hidden(20)
    assert made(x)[1].loss is not None
    assert made(x, cache=KeyValueCache.empty(model, 2, 20, torch.float64).layers[0])[1].loss is None
    assert made.eval()(x)[1].loss is None


def test_the_loss_brings_scores_to_attention_s_own_mass() -> None:
    made = module(config(ATTENTIONS["multi_head"], DISTILLED), torch.float32)
    optimizer, losses = torch.optim.Adam([made.k_proj.weight], lr=1e-2), []
    for step in range(60):
        loss = made(hidden(64, batch=4, seed=step, dtype=torch.float32))[1].loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # measured: 0.35 of it is left
    assert losses[-1] < 0.6 * losses[0]


def reached(made: MultiHeadAttention, x: Tensor) -> Tensor:
    """Which tokens of the sequence the last token's output has a gradient for."""
    leaf = x.clone().requires_grad_()
    made(leaf)[0][:, -1].sum().backward()
    return (leaf.grad.abs() > 0).any(dim=-1)


def test_a_branch_s_gradient_reaches_keys_that_are_not_chosen() -> None:
    choice = Blocks(k=4, block_q=1, block_k=4, learns="branch")
    x, attention = hidden(64), ATTENTIONS["multi_head"]
    assert bool(reached(module(config(attention, choice)), x).all())
    assert not bool(reached(module(config(attention, vary(choice, learns="nothing"))), x).all())


@pytest.mark.parametrize("attention", ["multi_head", "grouped"])
@pytest.mark.parametrize("name", ["entmax", "entmax_per_token"])
def test_entmax_leaves_blocks_out_and_counts_what_is_left(attention: str, name: str) -> None:
    made, x = module(config(ATTENTIONS[attention], LEARNING[name])), hidden(90)
    with torch.no_grad():
        _, selection = made(x)
    every = config(ATTENTIONS[attention], vary(LEARNING[name], learns="gated"))
    whole = module(every)(x)[1]
    lists = selection.counts.shape[1]
    assert int(selection.counts.sum()) < int(whole.counts.sum())
    assert selection.cost.kept < whole.cost.kept
    q = draw(2, lists, 90, 4)  # a head per list
    assert pairs(q, selection, 90) == selection.cost.kept


scores = st.lists(st.floats(-8, 8, allow_nan=False, width=32), min_size=1, max_size=24)


@given(scores, st.integers(1, 24))
@settings(deadline=None)
def test_entmax_over_the_best_is_entmax_over_all_where_it_leaves_out_one_of_them(all_of_them, most: int) -> None:
    score = torch.tensor(all_of_them, dtype=torch.float64)
    found, place = score.topk(min(most, len(score)))
    some, everything = (
        ways._entmax(x[None, None, None], torch.ones(1, 1, 1, len(x), dtype=torch.bool)).flatten()
        for x in (found, score)
    )
    defined = torch.stack(entmax(list(score)))
    # a threshold comes from a difference of squares up to 64, and a weight is the square of a distance from it
    torch.testing.assert_close(everything, defined, rtol=0, atol=1e-6)
    if bool((some == 0).any()):
        torch.testing.assert_close(some, everything[place], rtol=0, atol=1e-6)
        assert float(everything.sum()) == pytest.approx(float(everything[place].sum()), abs=1e-6)


def test_equal_scores_change_nothing() -> None:
    """A factor of 1 for each block: with keys that are all alike, gated and entmax are the plain choice."""
    q = torch.zeros(1, 2, 40, 6, dtype=torch.float64)
    for learns in ("gated", "entmax"):
        choice = Blocks(k=6, block_q=1, block_k=2, learns=learns)
        selection, compared = chosen(choice, q, q)
        bias = weighed(choice, selection, compared, 40, 0.7).bias
        torch.testing.assert_close(bias, torch.zeros_like(bias), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", LEARNING)
def test_nothing_is_as_large_as_all_pairs_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 512
    monkeypatch.setattr(SCORES, "CHUNK", length**2 // 8)
    monkeypatch.setattr(QUERY_BLOCKS, "GATHERED", length**2 // 2)  # bytes: a quarter as many numbers
    choice = vary(LEARNING[name], keep=None, k=8)
    made, x = module(config(ATTENTIONS["grouped"], choice), torch.float32), hidden(length, batch=1, dtype=torch.float32)
    with Largest() as largest:
        out, selection = made(x)
        (out.square().sum() + (selection.loss or 0)).backward()
    assert largest.numbers < length**2 / 2
