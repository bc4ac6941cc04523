"""Saved bytes against graphs whose saved tensors are known."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.meters.saved import saved_bytes

N = 100
ROW = N * 4  # bytes


def leaf() -> torch.Tensor:
    return torch.ones(N, requires_grad=True)


def test_a_sum_saves_nothing() -> None:
    x = leaf()
    assert saved_bytes(lambda: x.sum()).value == 0


def test_exp_saves_its_result() -> None:
    x = leaf()
    assert saved_bytes(lambda: x.exp()).value == ROW


def test_a_product_saves_both_factors_and_a_square_only_one_storage() -> None:
    x, y = leaf(), leaf()
    assert saved_bytes(lambda: x * y).value == 2 * ROW
    assert saved_bytes(lambda: x * x).value == ROW


def test_views_of_one_storage_count_once() -> None:
    x = leaf()
    assert saved_bytes(lambda: x[:50] * x[50:]).value == ROW


def test_parameters_are_left_out() -> None:
    layer, x = nn.Linear(N, N, bias=False), torch.ones(1, N)
    assert saved_bytes(lambda: layer(x), layer.parameters()).value == ROW


def test_what_forward_frees_is_not_counted() -> None:
    x = leaf()

    def forward() -> torch.Tensor:
        x.exp()  # its graph dies here
        return x.sin()

    assert saved_bytes(forward).value == ROW


def test_checkpointing_keeps_only_the_input() -> None:
    x = leaf()
    plain = saved_bytes(lambda: x.exp().sin().exp().cos())
    recomputed = saved_bytes(
        lambda: checkpoint(lambda y: y.exp().sin().exp().cos(), x, use_reentrant=False, preserve_rng_state=False)
    )
    # exp saves its result, and the sin or cos after it saves the same one.
    assert (plain.value, recomputed.value) == (2 * ROW, ROW)


def test_gradients_are_the_same_under_the_meter() -> None:
    x = leaf()
    outputs = []
    saved_bytes(lambda: outputs.append(x.exp().sum()))
    outputs[0].backward()
    torch.testing.assert_close(x.grad, x.detach().exp(), rtol=0, atol=0)
