"""Padding tokens do not count: not in outputs, loads, losses, capacities or what moves a bias."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.attention import KeyValueCache
from dsv3.config import (
    Adaptive,
    Balance,
    Capacity,
    Dropless,
    ExpertChoice,
    Fixed,
    MoE,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SwitchLoss,
    ZLoss,
)
from dsv3.model import Transformer
from dsv3.moe import MoELayer, balance_losses, sequence_loss
from tests.moe.layers import layer_of
from tests.train import small

ROWS, LENGTH = 3, 12
MOE = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=0)
CAPACITIES = {
    "dropless": Dropless(),
    "probability": Fixed(factor=0.75),
    "position": Fixed(factor=0.75, policy="position"),
    "reroute": Fixed(factor=0.75, policy="reroute"),
    "adaptive": Adaptive(),
}
LENGTHS = st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS)


def padded(layer: MoELayer, lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows whose padding is large, the tokens alone as one row, and the lengths."""
    width = layer.gate.weight.shape[1]
    x = torch.randn(ROWS, LENGTH, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])[None]
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 100.0
    return x, tokens, torch.tensor(lengths)


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=list(CAPACITIES))
@given(lengths=LENGTHS)
@settings(max_examples=25)
def test_a_padded_batch_is_the_batch_of_its_tokens(capacity: Capacity, lengths: list[int]) -> None:
    layer = layer_of(replace(MOE, capacity=capacity), bias=0.1).double()
    x, tokens, here = padded(layer, lengths)
    x.requires_grad_()
    y, routing = layer(x, here)
    alone, expected = layer(tokens)
    there = torch.arange(LENGTH) < here[:, None]
    torch.testing.assert_close(y[there], alone[0], rtol=0, atol=1e-12)
    assert not y[~there].any()
    assert torch.equal(routing.counts, expected.counts)
    assert (routing.kept is None) == (expected.kept is None)
    if routing.kept is not None:
        assert torch.equal(routing.kept, expected.kept)
    y.square().sum().backward()
    assert x.grad is not None
    assert not x.grad[~there].any()


@given(lengths=LENGTHS)
@settings(max_examples=25)
def test_experts_that_choose_choose_no_padding(lengths: list[int]) -> None:
    layer = layer_of(replace(MOE, balance=(ExpertChoice(),))).double().train()
    x, _, here = padded(layer, lengths)
    assert int(layer(x, here)[1].counts.sum()) == 2 * sum(lengths)


@given(lengths=LENGTHS)
@settings(max_examples=25)
def test_losses_of_a_batch_are_those_of_its_tokens(lengths: list[int]) -> None:
    methods: tuple[Balance, ...] = (SwitchLoss(), QuadraticLoss(), ZLoss())
    layer = layer_of(replace(MOE, balance=methods), bias=0.1).double()
    x, tokens, here = padded(layer, lengths)
    found = balance_losses(layer(x, here)[1], layer.moe, ROWS)
    expected = balance_losses(layer(tokens)[1], layer.moe, 1)
    assert list(found) == list(expected) == ["switch", "quadratic", "z"]
    torch.testing.assert_close(list(found.values()), list(expected.values()), rtol=1e-12, atol=0)
    pulls = [torch.autograd.grad(sum(losses.values()), layer.gate.weight)[0] for losses in (found, expected)]  # type: ignore[arg-type]
    torch.testing.assert_close(*pulls, rtol=1e-12, atol=1e-15)
    if not any(lengths):
        assert not any(found.values())


@given(lengths=LENGTHS)
@settings(max_examples=25)
def test_the_sequence_loss_is_the_mean_over_rows_that_have_tokens(lengths: list[int]) -> None:
    layer = layer_of(replace(MOE, balance=(SequenceLoss(),)), bias=0.1).double()
    x, _, here = padded(layer, lengths)
    rows = [row[None, :length] for row, length in zip(x, lengths, strict=True) if length]
    each = [sequence_loss(layer(row)[1], 1) for row in rows] or [torch.zeros((), dtype=torch.float64)]
    torch.testing.assert_close(sequence_loss(layer(x, here)[1], ROWS), torch.stack(each).mean(), rtol=0, atol=1e-12)


def test_rows_without_padding_have_the_loss_and_the_gradient_that_they_had() -> None:
    layer = layer_of(replace(MOE, balance=(SequenceLoss(),)), bias=0.1).double()
    x, _, here = padded(layer, [LENGTH] * ROWS)
    found = [
        torch.autograd.grad(sequence_loss(routing, ROWS), layer.gate.weight)[0]
        for routing in (layer(x)[1], layer(x, here)[1])
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bins", [50, None])
def test_padding_asks_nothing_of_a_bias(bins: int | None) -> None:
    layer = layer_of(replace(MOE, balance=(QuantileBias(bins=bins),))).double()
    x, tokens, here = padded(layer, [5, 12, 0])
    asked, expected = layer.demand(layer(x, here)[1]), layer.demand(layer(tokens)[1])
    assert asked is not None
    assert expected is not None
    assert torch.equal(asked, expected)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(small.config((SequenceLoss(),)).model, seed=0).double().eval()


def test_a_models_padded_rows_say_what_they_say_alone(model: Transformer) -> None:
    tokens = torch.randint(0, model.config.vocab_size, (3, 10), generator=torch.Generator().manual_seed(1))
    lengths = [10, 4, 7]
    found = model(tokens, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(found.logits[row, :length], alone.logits[0], rtol=0, atol=1e-12)
        for ahead, (ours, theirs) in enumerate(zip(found.mtp_logits, alone.mtp_logits, strict=True), start=1):
            torch.testing.assert_close(ours[row, : length - ahead], theirs[0], rtol=0, atol=1e-12)
    routed = [int(routing.counts.sum()) for routing in found.routing]
    k, depths = model.config.moe.num_experts_per_tok, len(found.mtp_logits)  # type: ignore[union-attr]
    assert routed[len(routed) - depths :] == [k * (sum(lengths) - 3 * ahead) for ahead in range(1, depths + 1)]
    assert set(routed[: len(routed) - depths]) == {k * sum(lengths)}


def test_a_model_of_padding_alone_has_losses_of_zero_and_no_gradient_of_its_routers() -> None:
    methods = (SequenceLoss(), SwitchLoss(), QuadraticLoss(), ZLoss())
    model = Transformer(small.config(methods).model, seed=0)
    output = model(torch.zeros(3, 10, dtype=torch.int64), lengths=torch.zeros(3, dtype=torch.int64))
    moe = model.config.moe
    assert moe is not None
    losses = [loss for routing in output.routing for loss in balance_losses(routing, moe, 3).values()]
    assert [loss.item() for loss in losses] == [0.0] * 4 * len(output.routing)
    torch.stack(losses).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("lengths", [[1, 2], [1, 2, 11], [1, 2, -1]])
def test_lengths_of_other_rows_are_refused(model: Transformer, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths=.*must be 3 numbers in \[0, 10\]"):
        model(torch.zeros(3, 10, dtype=torch.int64), lengths=torch.tensor(lengths))


def test_a_cache_takes_no_lengths(model: Transformer) -> None:
    cache = KeyValueCache.empty(model.config, 1, 8, torch.float64)
    with pytest.raises(ValueError, match="must be None with a cache"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache, lengths=torch.tensor([3]))
