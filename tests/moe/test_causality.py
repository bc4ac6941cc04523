"""Which choices let a later token of a sequence change what an earlier one's experts are: named, and all others shown
not to.

A choice that does learns in training from what it cannot know when it generates. All are causal at inference.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import (
    Adaptive,
    Balance,
    Capacity,
    CentredSignBias,
    Dropless,
    ExpertChoice,
    Fixed,
    MoE,
    ProportionalBias,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SimilarityLoss,
    SwitchLoss,
    ZLoss,
)
from dsv3.moe import MoELayer
from tests.moe.layers import layer_of

TOKENS = 24


@dataclass(frozen=True)
class Arm:
    balance: tuple[Balance, ...] = ()
    capacity: Capacity = field(default_factory=Dropless)
    same_batch: bool = False  # the bias is moved by the batch that it then routes


ARMS = {
    "none": Arm(),
    "sign": Arm((SignBias(rate=0.1),)),
    "centred sign": Arm((CentredSignBias(rate=0.1),)),
    "proportional": Arm((ProportionalBias(rate=0.1),)),
    "quantile": Arm((QuantileBias(),)),
    "exact quantile": Arm((QuantileBias(bins=None),)),
    "sequence": Arm((SequenceLoss(),)),
    "switch": Arm((SwitchLoss(),)),
    "quadratic": Arm((QuadraticLoss(),)),
    "similarity": Arm((SimilarityLoss(),)),
    "z": Arm((ZLoss(),)),
    "drop by position": Arm(capacity=Fixed(factor=0.75, policy="position")),
    "drop by probability": Arm(capacity=Fixed(factor=0.75, policy="probability")),
    "reroute": Arm(capacity=Fixed(factor=0.75, policy="reroute")),
    "past loads, by position": Arm(capacity=Adaptive(policy="position")),
    "past loads, by probability": Arm(capacity=Adaptive(policy="probability")),
    "past loads, reroute": Arm(capacity=Adaptive(policy="reroute")),
    "expert choice": Arm((ExpertChoice(),)),
    "quantile of the same batch": Arm((QuantileBias(),), same_batch=True),
}
LOOK_AHEAD = {
    "drop by probability",
    "reroute",
    "past loads, by probability",
    "past loads, reroute",
    "expert choice",
    "quantile of the same batch",
}


def layer_for(arm: Arm) -> MoELayer:
    moe = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8)
    layer = layer_of(replace(moe, balance=arm.balance, capacity=arm.capacity), bias=0.1)
    if layer.largest_load is not None:
        layer.largest_load.fill_(0.75)  # no past is as uneven as that: for something to drop
    return layer


def chosen(arm: Arm, x: torch.Tensor, *, training: bool = True) -> torch.Tensor:
    """Which experts take each token [N, E]."""
    layer = layer_for(arm).train(training)
    routing = layer(x)[1]
    if arm.same_batch and training:
        asked = layer.demand(routing)
        assert asked is not None
        layer.update_bias(asked)
        routing = layer(x)[1]
    taken = torch.ones_like(routing.indices, dtype=torch.bool) if routing.kept is None else routing.kept
    return torch.zeros(TOKENS, 8, dtype=torch.bool).scatter_(1, routing.indices, taken)


def two_futures(seed: int, now: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence, and one with other tokens from `now` on, each a larger copy of one before: it wants the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, 16, generator=generator)
    other = x.clone()
    other[0, now:] = 4 * x[0, torch.randint(now, (TOKENS - now,), generator=generator)]
    return x, other


@given(seed=st.integers(0, 2**31), now=st.integers(1, TOKENS - 1))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("name", sorted(ARMS.keys() - LOOK_AHEAD))
def test_no_later_token_changes_an_earlier_ones_experts(name: str, seed: int, now: int) -> None:
    one, other = (chosen(ARMS[name], x)[:now] for x in two_futures(seed, now))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", sorted(LOOK_AHEAD))
def test_those_that_look_ahead_are_these(name: str) -> None:
    pairs = [[chosen(ARMS[name], x)[:12] for x in two_futures(seed, 12)] for seed in range(5)]
    assert not all(torch.equal(one, other) for one, other in pairs)


@given(seed=st.integers(0, 2**31), now=st.integers(1, TOKENS - 1))
@settings(max_examples=5, deadline=None)
@pytest.mark.parametrize("name", ARMS)
def test_at_inference_none_looks_ahead(name: str, seed: int, now: int) -> None:
    one, other = (chosen(ARMS[name], x, training=False)[:now] for x in two_futures(seed, now))
    assert torch.equal(one, other)
