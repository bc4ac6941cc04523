"""Gradient paths: what is cut carries nothing, what is not cut is the usual step, and clipping is of each expert."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.gradient_paths import (
    Path,
    Paths,
    cosines,
    detached,
    domain_batches,
    expert_gradients,
    router_agreements,
    step,
)
from dsv3.config import Config, QuadraticLoss, vary
from dsv3.data.prepare import Split
from dsv3.moe.isolation import expert_norms
from dsv3.train import TrainState, train_step
from tests.train import small

LOSS = QuadraticLoss(alpha=0.5)


def config(**changes: object) -> Config:
    return vary(small.config(), **{"model.moe.balance": (LOSS,), **changes})


def rows(seed: int = 0) -> Tensor:
    return torch.randint(small.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(seed))


def trained(chosen: Config, paths: Paths | None) -> tuple[TrainState, float]:
    """After three steps, by `step` or, without paths, by the training's own; and the share clipped in the last."""
    state, share = TrainState.create(chosen, seed=0), 0.0
    for number in range(3):
        if paths is None:
            train_step(state, rows(number))
        else:
            _, share = step(state, rows(number), paths)
    return state, share


def same(one: TrainState, other: TrainState) -> bool:
    return all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


def test_without_a_cut_a_step_is_the_trainings_own_bit_for_bit() -> None:
    assert same(trained(config(), Paths())[0], trained(config(), None)[0])


def test_a_balance_loss_that_is_detached_trains_nothing() -> None:
    cut, _ = trained(config(), Paths(detached="balance"))
    without, _ = trained(config(**{"model.moe.balance": ()}), None)
    assert same(cut, without)
    assert not same(cut, trained(config(), None)[0])


@pytest.mark.parametrize("balance, moves", [((), False), ((LOSS,), True)])
def test_a_router_detached_from_language_learns_from_balance_alone(
    balance: tuple[QuadraticLoss, ...], moves: bool
) -> None:
    chosen = config(**{"model.moe.balance": balance})
    before = TrainState.create(chosen, seed=0).expert_layers[0].gate.weight.clone()
    state, _ = trained(chosen, Paths(detached="language"))
    assert torch.equal(state.expert_layers[0].gate.weight, before) is not moves


def test_after_a_step_no_hook_is_left() -> None:
    state = TrainState.create(config(), seed=0)
    step(state, rows(), Paths(detached="language", experts=1e-3))
    with detached(state, "balance"):
        pass
    assert not any(layer.gate._forward_hooks for layer in state.expert_layers)
    assert not state.optimizer._optimizer_step_pre_hooks


def gradients(paths: Paths) -> tuple[Tensor, Tensor, float]:
    """What a step of plain descent used: each expert's norm, that of all others, and the share clipped."""
    state = TrainState.create(config(**{"train.clip_grad_norm": 1e6}), seed=0)
    before = [weight.detach().clone() for weight in state.model.parameters()]
    report, share = step(state, rows(), paths)
    used = {
        weight: (old - weight.detach()).double() / report.lr
        for weight, old in zip(state.model.parameters(), before, strict=True)
    }
    experts = [[used.pop(weight) for weight in layer.experts.parameters()] for layer in state.expert_layers]
    others = torch.stack([gradient.norm() for gradient in used.values()]).norm()
    return torch.cat([expert_norms(layer) for layer in experts]), others, share


def test_each_expert_is_clipped_by_itself_and_everything_else_together() -> None:
    free, rest, none = gradients(Paths(experts=1e6, others=1e6))
    most = free.sort().values[3:5].mean().item()  # half of the eight are above it
    experts, others, share = gradients(Paths(experts=most, others=0.01))
    # A difference of weights near 0.1 in fp32 has 4 digits of a step of 1e-3.
    torch.testing.assert_close(experts, free.clamp(max=most), rtol=1e-2, atol=1e-4)
    assert rest > 0.1
    assert others.item() == pytest.approx(0.01, rel=0.1)
    assert none == 0.0
    assert share == 0.5


@pytest.mark.parametrize("most, share", [(1e-3, 1.0), (1e6, 0.0)])
def test_one_norm_clips_all_experts_or_none(most: float, share: float) -> None:
    assert trained(config(**{"train.clip_grad_norm": most}), Paths())[1] == share


def test_batches_of_a_domain_are_of_its_text_and_share_no_row() -> None:
    tokens = np.arange(400, dtype=np.uint16)
    split = Split(tokens=tokens, starts=np.array([0, 100, 200, 400]), domains=np.array([0, 0, 1]))
    found = domain_batches(split, length=10, rows=4)
    assert found.shape == (2, 2, 4, 11)
    first = found[..., 0]
    assert (first[0] < 200).all()
    assert (first[1] >= 200).all()
    assert first.unique().numel() == 16
    assert (found[..., 1:] - found[..., :-1] == 1).all()
    with pytest.raises(ValueError, match="rows=11: must be at most half of the 20 rows of a domain"):
        domain_batches(split, length=10, rows=11)


def test_gradients_of_two_texts_add_up_to_that_of_both() -> None:
    state = TrainState.create(config(), seed=0)
    chosen = vary(state.config, **{"model.moe.balance": ()})
    state.config = chosen
    parts = [expert_gradients(state, rows(seed), None) for seed in (0, 1)]
    whole = expert_gradients(state, torch.cat([rows(0), rows(1)]), None)
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["balance", "language"])
def test_the_last_experts_gradient_does_not_change_when_its_router_is_detached(path: Path) -> None:
    state = TrainState.create(config(**{"model.mtp": None}), seed=0)
    torch.testing.assert_close(expert_gradients(state, rows(), path), expert_gradients(state, rows(), None))


def test_a_balance_loss_is_compared_with_the_language_loss_also_where_training_has_none() -> None:
    given = config()
    without = TrainState.create(config(**{"model.moe.balance": ()}), seed=0)
    moe = given.model.moe
    assert moe is not None
    (found,) = router_agreements(without, rows(), moe)
    (trained_with,) = router_agreements(TrainState.create(given, seed=0), rows(), moe)
    assert found == trained_with
    assert found.norm_ratio > 0
    assert abs(found.cosine) < 1


def test_cosines_are_of_experts_that_all_batches_reach() -> None:
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    nothing = torch.zeros(2)
    one = [torch.stack([right, right, nothing]), torch.stack([right, up, right])]
    other = [torch.stack([up, -right, right]), torch.stack([up, -up, right])]
    within, between = cosines([one, other])
    assert within.tolist() == [1.0, 0.0]
    assert between.tolist() == [0.0, -0.5]
