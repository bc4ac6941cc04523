"""The indexer's loss: its value and gradients against loops, what it must not reach, and that it teaches something."""

from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3.attention import KeyValueCache, LatentAttention, Selection
from dsv3.attention.select import indexer
from dsv3.attention.select import reference as by_content
from dsv3.attention.select.distillation import distillation
from dsv3.attention.select.scores import index_scores
from dsv3.config import Everything, Indexer, vary
from tests.attention.test_contract import FLOAT64
from tests.attention.variants import INDEXER, LATENT, config, hidden, module

SCORES = import_module("dsv3.attention.select.scores")
QUERY_BLOCKS = import_module("dsv3.attention.query_blocks")
WARMUP = vary(INDEXER, stage="warmup")
Drawn = tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

both_stages = pytest.mark.parametrize("stage", ["warmup", "sparse"])


def drawn(length: int, *, batch: int = 2, heads: int = 4, groups: int = 2) -> Drawn:
    """Queries, weights and keys of an indexer, and attention's queries and keys."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    of_indexer = [draw(batch, length, 3, 5), draw(batch, length, 3), draw(batch, length, 5)]
    return of_indexer, (draw(batch, heads, length, 6), draw(batch, groups, length, 6))


def held(of_indexer: list[torch.Tensor], stage: str) -> Selection | None:
    prunes = stage == "sparse" and of_indexer[0].shape[1] > 4
    return indexer(*of_indexer, topk=4) if prunes else None


@both_stages
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 4, 13])
@pytest.mark.parametrize("chunk", [1, 700, SCORES.CHUNK])
def test_loss_and_gradients_are_those_of_the_definition(
    stage: str, heads: int, groups: int, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SCORES, "CHUNK", chunk)
    of_indexer, attended = drawn(length, heads=heads, groups=groups)
    selection = held(of_indexer, stage)
    ours = distillation(*of_indexer, attended, selection, scale=0.7)
    scores = index_scores(*of_indexer)
    seen = by_content.indexed(scores.tolist(), length if selection is None else 4)
    theirs = by_content.divergence(scores, *attended, seen, 0.7)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)
    pairs = zip(torch.autograd.grad(3 * ours, of_indexer), torch.autograd.grad(3 * theirs, of_indexer), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=FLOAT64, atol=FLOAT64)


@both_stages
def test_gradients_are_those_of_finite_differences_at_a_held_selection(stage: str) -> None:
    of_indexer, attended = drawn(9)
    selection = held(of_indexer, stage)
    assert torch.autograd.gradcheck(
        lambda *leaves: distillation(*leaves, attended, selection, scale=0.7), of_indexer, fast_mode=False
    )


def test_scores_that_are_attention_s_own_logits_have_no_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(2, 1, 9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    one = torch.ones(2, 9, 1, dtype=torch.float64)
    loss = distillation(q.transpose(1, 2), one, k[:, 0], (q, k), None, scale=1.0)
    assert abs(float(loss)) < FLOAT64


@both_stages
def test_the_loss_teaches_the_indexer_alone(stage: str) -> None:
    model = config(LATENT, vary(INDEXER, stage=stage))
    made, x = module(model), hidden(31).requires_grad_()
    made(x)[1].loss.backward()
    assert x.grad is None
    learns = {name for name, p in made.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert learns == {f"indexer.{name}" for name, _ in made.indexer.named_parameters()}
    assert all(p.grad is None for name, p in made.named_parameters() if not name.startswith("indexer."))


@both_stages
@pytest.mark.parametrize("loss_weight", [0.5, 1000.0])
def test_gradients_of_all_else_are_the_same_bit_for_bit_with_and_without_it(stage: str, loss_weight: float) -> None:
    x, grads = hidden(31, dtype=torch.float32), []
    for factor in (0.0, loss_weight):
        made, leaf = module(config(LATENT, vary(INDEXER, stage=stage)), torch.float32), x.clone().requires_grad_()
        out, selection = made(leaf)
        (out.square().sum() + factor * selection.loss).backward()
        grads.append([leaf.grad, *(p.grad for name, p in made.named_parameters() if "indexer" not in name)])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_attention_is_dense_while_the_indexer_warms_up() -> None:
    made, x = module(config(LATENT, WARMUP), torch.float32), hidden(31, dtype=torch.float32)
    dense = module(config(LATENT, Everything()), torch.float32)
    dense.load_state_dict({name: weight for name, weight in made.state_dict().items() if "indexer" not in name})
    out, selection = made(x)
    assert torch.equal(out, dense(x)[0])
    assert (selection.cost.scored, selection.cost.kept) == (0, 2 * 31 * 32 // 2)


def test_there_is_a_loss_only_in_training() -> None:
    model = config(LATENT, INDEXER)
    made, x = module(model), hidden(9)
    assert made(x)[1].loss is not None
    cache = KeyValueCache.empty(model, 2, 9, torch.float64)
    assert made(x, cache=cache.layers[0])[1].loss is None
    assert made.eval()(x)[1].loss is None
    assert module(config(LATENT, vary(INDEXER, loss_weight=0)))(x)[1].loss is None


@both_stages
def test_autocast_leaves_the_loss_in_fp32(stage: str) -> None:
    made = module(config(LATENT, vary(INDEXER, stage=stage)), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, selection = made(hidden(31, dtype=torch.float32))
    assert selection.loss.dtype == torch.float32
    selection.loss.backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in made.indexer.parameters())
    # inputs are rounded to 8 bits, and with them which keys are seen
    whole = made(hidden(31, dtype=torch.float32))[1].loss
    torch.testing.assert_close(selection.loss, whole, rtol=0.1, atol=0)


def test_a_loss_scale_keeps_gradients_from_underflow_in_fp16() -> None:
    (q, weight, k), attended = drawn(64)
    grads = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16)):
        leaves = [q.detach().to(dtype).requires_grad_(), k.detach().to(dtype).requires_grad_()]
        loss = distillation(leaves[0], 1e-5 * weight.detach(), leaves[1], attended, None, scale=1.0)
        grads.append([grad.float() / scale for grad in torch.autograd.grad(loss * scale, leaves)])
    for wide, half in zip(*grads, strict=True):
        assert wide.abs().median() < 2.0**-25, "most are 0 in fp16"
        # inputs and gradients are each rounded to 11 bits
        assert (half - wide).norm() < 2.0**-8 * wide.norm()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@both_stages
def test_nothing_is_as_large_as_all_pairs_forward_and_backward(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 256
    monkeypatch.setattr(SCORES, "CHUNK", length**2 // 4)
    monkeypatch.setattr(QUERY_BLOCKS, "GATHERED", length**2)  # bytes: a quarter as many numbers
    made, x = (
        module(config(LATENT, vary(INDEXER, stage=stage)), torch.float32),
        hidden(length, batch=1, dtype=torch.float32),
    )
    with Largest() as largest:
        out, selection = made(x)
        (out.square().sum() + selection.loss).backward()
    assert largest.numbers < length**2 / 2


def mass(made: LatentAttention, x: torch.Tensor, topk: int) -> tuple[float, float]:
    """The share of dense attention's weight, of tokens with more than topk before them, on the keys that the indexer
    picks, and on as many at random.
    """
    position = torch.arange(x.shape[1])
    with torch.no_grad():
        q_nope, q_rope, q_index = made._query(x, position)
        memory = made._memory(x, position)
        q, k, _ = made._expanded(q_nope, q_rope, memory["latent"])
        later = position > position[:, None]
        weight = (q @ k.mT * made.scale).masked_fill(later, float("-inf")).softmax(-1).mean(dim=1)
        picked = indexer(q_index, made.indexer._weight(x), memory["index_key"], topk=topk).indices[:, 0]
    held = weight.gather(-1, picked)[:, topk:].sum(dim=-1)
    return float(held.mean()), float((topk / (position[topk:] + 1)).mean())


def test_warming_up_finds_the_keys_that_attention_rests_on() -> None:
    """Held-out inputs; the best 6 keys of each token hold 0.76 of the weight, the indexer reaches 0.5."""
    choice = Indexer(index_n_heads=16, index_head_dim=16, index_topk=6, stage="warmup")
    made = module(config(LATENT, choice), torch.float32)
    heldout = hidden(64, batch=8, seed=1000, dtype=torch.float32)
    before, at_random = mass(made, heldout, 6)
    optimizer = torch.optim.Adam(made.indexer.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        _, selection = made(hidden(64, batch=4, seed=step, dtype=torch.float32))
        optimizer.zero_grad()
        selection.loss.backward()
        optimizer.step()
        losses.append(selection.loss.item())
    after, _ = mass(made, heldout, 6)
    assert abs(before - at_random) < 0.05
    assert after > at_random + 0.15
    assert losses[-1] < 0.75 * losses[0]
