"""Training on from routers that have collapsed: how they are made to, and what batches then ask of their experts.

With x_n what the router of a layer reads of token n of one batch, and w_i expert i's row of its weight:

    u = mean of x_n / |mean of x_n|^2           the mean of x_n . u is 1
    w_i += size * u   for the first few i       their logits rise, by `size` in the mean over tokens
    size                                        the least, by bisection, at which MaxVio of the batch is as asked

Layers collapse from the first to the last, each at the input that the collapsed ones before it leave. The shift lies in
the weight and nowhere else, so that the gradient of a loss can take it back and a selection bias can make up for it.

Then training goes on, and before each update the loads of its batch are looked at as a model is used: each token
chooses, also where experts choose in training. Looks are forward passes of their own, as in `bench.routed_training`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bench.training import sick_steps
from dsv3.config.rules import require
from dsv3.data.pack import Batches
from dsv3.model import Transformer
from dsv3.moe import max_vio
from dsv3.moe.layer import Gate
from dsv3.moe.routing import Routing
from dsv3.train import TrainState, train_step

BISECTIONS = 30
LARGEST = 8.0  # size of a shift: beyond it sigmoids round to 1, and ties choose


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """What was done to each layer: by how much the mean score of its favoured experts rose, and MaxVio then."""

    score_offset: tuple[float, ...]
    max_vio: tuple[float, ...]


@torch.no_grad()
def collapse(state: TrainState, rows: Int[Tensor, "B T1"], *, favoured: int, violation: float) -> Collapse:
    """Collapse all routers of a model without multi-token prediction, in place, on the first `favoured` experts, to
    a MaxVio of `violation` on the batch `rows`.

    Raises:
        ValueError: a model that looks ahead; a MaxVio that no shift of so many experts gives, which leaves the model
            part collapsed.
    """
    rule = "must be None: routers that look ahead are not run"
    require(state.config.model.mtp is None, "model.mtp", state.config.model.mtp, rule, "leave it out")
    offsets, violations = [], []
    for layer in state.expert_layers:
        x = _read(state.model, layer.gate, rows)
        most = len(layer.gate.weight) / layer.moe.num_experts_per_tok - 1
        rule = f"must be at most E / K - 1 = {most:g}, all tokens at one expert"
        require(violation <= most, "violation", violation, rule, "lower it, or take more experts")
        offset, found = _collapsed(layer.gate, x, favoured, violation)
        offsets.append(offset)
        violations.append(found)
    return Collapse(score_offset=tuple(offsets), max_vio=tuple(violations))


@torch.no_grad()
def asked(model: Transformer, rows: Int[Tensor, "B T1"]) -> Int[Tensor, "L E"]:
    """Tokens per expert of a batch in each layer, each token choosing for itself; leaves the model at evaluation."""
    return torch.stack([routing.counts for routing in model.eval()(rows[:, :-1], mtp=False).routing])


def watched(state: TrainState, batches: Batches, updates: int) -> list[Int[Tensor, "L E"]]:
    """Make so many updates, in place: the loads of the next batch after 0, 1, ... of them.

    Raises:
        FloatingPointError: when an update is not finite.
    """
    seen = []
    for _ in range(updates):
        rows = batches.next()
        seen.append(asked(state.model, rows))
        if sick := sick_steps([train_step(state, rows)]):
            raise FloatingPointError(sick)
    return [*seen, asked(state.model, batches.next())]


def _read(model: Transformer, gate: Gate, rows: Tensor) -> Float[Tensor, "N D"]:
    """What the gate reads of the batch."""
    seen: list[Tensor] = []
    hook = gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        asked(model, rows)
    finally:
        hook.remove()
    return seen[0]


def _collapsed(gate: Gate, x: Tensor, favoured: int, asked_for: float) -> tuple[float, float]:
    before, middle = gate.weight.clone(), x.mean(dim=0)
    direction = middle / middle.dot(middle)

    def shifted(size: float) -> Routing:
        gate.weight.copy_(before)
        gate.weight[:favoured] += size * direction
        routing: Routing = gate(x)
        return routing

    def violation(size: float) -> float:
        return float(max_vio(shifted(size).counts))

    healthy = shifted(0.0).scores[:, :favoured].mean()
    found = violation(size := _least(lambda size: violation(size) >= asked_for))
    return float(shifted(size).scores[:, :favoured].mean() - healthy), found


def _least(enough: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 2 * high
        rule = "does not collapse the router: too many tokens point away from the others' mean"
        require(high <= LARGEST, "size", high, rule, "favour fewer experts, or ask for a lower MaxVio")
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
