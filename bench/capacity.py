"""What a capacity does to experts: what it refuses and leaves empty, and what a training step under it costs.

Shares are of a batch as training routes it, counted on the side: the forward pass is run once more, without gradients.
Costs of several capacities are those of steps on the same weights, so that nothing but the capacity differs: the models
share them, and a schedule that has ended at zero moves none.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.forced_balance import forced_balance
from bench.meters.paired import Block, plan, process_clock, time_block
from dsv3.config import Adaptive, Capacity, Dropless, Fixed, MoE, vary
from dsv3.data.pack import Batches
from dsv3.moe import MoELayer, Routing, drop_floor, dropped_share, expert_capacity, load_statistics
from dsv3.moe.capacity import adaptive_capacity, averaged
from dsv3.train import TrainState, train_step
from dsv3.train.step import StepReport


@torch.no_grad()
def routed(state: TrainState, rows: Tensor) -> list[tuple[MoELayer, Routing]]:
    """The layers with experts and their routing of a batch, as a step on it would have it."""
    state.model.train()
    routings = state.model(rows[:, :-1]).routing
    return list(zip(state.expert_layers, routings, strict=True))


def figures(layer: MoELayer, routing: Routing) -> dict[str, float]:
    """Balance of one layer's batch; with a capacity also what it has room for, refuses, drops and leaves empty."""
    moe, tokens = layer.moe, len(routing.indices)
    k, experts = moe.num_experts_per_tok, moe.n_routed_experts
    loads = load_statistics(routing.counts, k)
    found = {"max_vio": loads.max_vio, "excess_max_vio": loads.excess_max_vio}
    most = room(layer, tokens)
    if most is None:
        return found
    dropped, slots = dropped_share(routing.kept), experts * most
    return found | {
        "capacity_factor": slots / (tokens * k),
        "refused_share": refused_share(routing, most),
        "drop_share": dropped,
        "drop_floor": drop_floor(experts, k, tokens, most),
        "empty_slot_share": 1 - tokens * k * (1 - dropped) / slots,
    }


def room(layer: MoELayer, tokens: int) -> int | None:
    """How many of so many tokens an expert takes now; None: all."""
    capacity, average = layer.moe.capacity, layer.largest_load
    if isinstance(capacity, Fixed):
        return expert_capacity(tokens, layer.moe, capacity.factor)
    return None if average is None else int(adaptive_capacity(tokens, layer.moe, average))


def refused_share(routing: Routing, most: int) -> float:
    """The share of pairs that ask a full expert, whatever becomes of them."""
    over = (routing.counts - most).clamp(min=0).sum()
    return float(over.double() / routing.counts.sum())


def refusals(routing: Routing, moe: MoE, factors: tuple[float, ...]) -> dict[float, float]:
    """By capacity factor, how much a capacity would refuse of a routing that has none."""
    tokens = len(routing.indices)
    return {factor: refused_share(routing, expert_capacity(tokens, moe, factor)) for factor in factors}


def frozen(state: TrainState) -> TrainState:
    """A copy whose steps cost what training steps do, and move no weight: its schedule has ended, at zero."""
    copy = TrainState.create(vary(state.config, **{"train.schedule.final": 0.0}), seed=0, device=state.device)
    copy.load_state_dict(state.state_dict())
    copy.step = state.config.train.steps
    return copy


def past(state: TrainState, batches: Batches, steps: int, momentum: float) -> list[Tensor]:
    """Per layer the average of largest loads that so many steps on these weights would have left."""
    averages = [torch.tensor(torch.inf, device=state.device) for _ in state.expert_layers]
    for _ in range(steps):
        seen = routed(state, batches.next().to(state.device))
        averages = [averaged(old, each.counts, momentum) for old, (_, each) in zip(averages, seen, strict=True)]
    return averages


@dataclass(frozen=True)
class Limited:
    """A model under a capacity, which others may share.

    averages  of an adaptive capacity, per layer, moved by its steps
    balanced  the seed of forced balance; None: as the router routes
    """

    state: TrainState
    capacity: Capacity
    averages: tuple[Tensor, ...] = ()
    balanced: int | None = None

    @contextmanager
    def applied(self) -> Iterator[TrainState]:
        """Inside, the model's layers have this capacity."""
        layers = self.state.expert_layers
        assert all(isinstance(layer.moe.capacity, Dropless) for layer in layers), "the model itself is dropless"
        assert isinstance(self.capacity, Adaptive) == bool(self.averages), "an average for each layer, or none"
        before = [layer.moe for layer in layers]
        model, seed = self.state.model, self.balanced
        try:
            for at, layer in enumerate(layers):
                layer.moe = replace(layer.moe, capacity=self.capacity)
                layer.largest_load = self.averages[at] if self.averages else None
            with nullcontext() if seed is None else forced_balance(model, seed):
                yield self.state
        finally:
            for layer, moe in zip(layers, before, strict=True):
                layer.moe, layer.largest_load = moe, None

    def step(self, rows: Tensor) -> StepReport:
        """A training step under the capacity."""
        with self.applied() as state:
            return train_step(state, rows)


def step_blocks(arms: Mapping[str, Limited], batches: Batches, blocks: int) -> list[Block]:
    """Times of a step of each arm, interleaved in blocks; a block's arms take the same batch, the next one another."""

    def on(rows: Tensor) -> dict[str, Callable[[], StepReport]]:
        return {name: partial(arm.step, rows) for name, arm in arms.items()}

    calls = plan(on(batches.next()), least=blocks, seconds=0.0).calls
    return [time_block(on(batches.next()), at, calls, process_clock) for at in range(blocks)]
