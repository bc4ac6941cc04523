"""One training step: forward and backward of each microbatch, then one update.

    gradients    mean over microbatches, then over processes; divided by the loss scale; clipped to a norm
    update       optimizer at the scheduled rate; then the routers' biases and adaptive capacities, by the loads of the
                 whole global batch before any dropping
    indexers     clipped by themselves: neither their loss nor the main one shrinks the other's step
    a gradient that is not finite skips the update, and the report says so

Accumulation changes nothing but rounding where every loss is a mean over tokens or sequences and no expert is full. It
does change batch-wide balance losses (each microbatch has statistics of its own; for the quadratic loss the mean of
squares exceeds the square of the mean) and a capacity (each microbatch drops for itself).
"""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.config.rules import require
from dsv3.data.baseline import bits_per_byte
from dsv3.data.pack import share
from dsv3.model import ModelOutput, Transformer
from dsv3.moe import max_vio
from dsv3.parallel import ALONE, Ranks
from dsv3.precision import autocast, unscale, update
from dsv3.train.loss import loss_parts
from dsv3.train.schedule import share_of_peak
from dsv3.train.state import TrainState, indexers


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did; all of it is about the global batch but the times, which are this process's.

    Attributes:
        step: counted from 1.
        losses: nats, by the names of `dsv3.train.loss`, means over the batch.
        grad_norm: of the whole gradient, before clipping.
        lr: the learning rate of this step.
        tokens: targets of the main loss.
        text_bytes: bytes of text that these targets stand for; 0 if unknown.
        seconds: wall time.
        cpu_seconds: CPU time of this process.
        max_vio: `dsv3.moe.max_vio` of each expert layer, before dropping.
        dropped: share of token-expert pairs that capacity dropped.
        health: "ok", or why the update was skipped.
    """

    step: int
    losses: dict[str, float]
    grad_norm: float
    lr: float
    tokens: int
    text_bytes: int = 0
    seconds: float
    cpu_seconds: float
    max_vio: tuple[float, ...]
    dropped: float
    health: str

    @property
    def bits_per_byte(self) -> float | None:
        """The main loss per byte of text; None if the bytes are unknown."""
        return bits_per_byte(self.losses["main"] * self.tokens, self.text_bytes) if self.text_bytes else None


@dataclass(frozen=True)
class _Tally:
    """Sums over microbatches: losses by name, pairs kept per layer, loads per layer and expert, and of routers whose
    biases are moved by more than loads, by what.
    """

    losses: dict[str, Tensor]
    kept: Tensor
    counts: Tensor
    demand: tuple[Tensor, ...]


def train_step(
    state: TrainState, rows: Int[Tensor, "B T1"], *, ranks: Ranks = ALONE, text_bytes: int = 0
) -> StepReport:
    """Move `state` by one step on the global batch `rows`, of which each process takes its share.

    Raises:
        ValueError: several processes for routers whose biases need all scores of a step at once.
    """
    moe = state.config.model.moe
    rule = "must be alone with QuantileBias(bins=None), which needs all scores of a step at once"
    whole = ranks.world == 1 or moe is None or not moe.reads_whole_steps
    require(whole, "processes", ranks.world, rule, "give it bins, whose counts add up")
    wall, cpu = time.perf_counter(), time.process_time()
    train = state.config.train
    state.step += 1
    rate = train.optimizer.lr * share_of_peak(train.schedule, state.step, train.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.model.train()
    tally = _over_ranks(_accumulate(state, rows, ranks), ranks)
    norm, health = _update(state, tally, ranks)
    routed = tally.counts.sum().item()
    return StepReport(
        step=state.step,
        losses={name: value.item() for name, value in tally.losses.items()},
        grad_norm=norm,
        lr=rate,
        tokens=rows[:, 1:].numel(),
        text_bytes=text_bytes,
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        max_vio=tuple(max_vio(tally.counts).tolist()) if routed else (),
        dropped=1 - tally.kept.sum().item() / routed if routed else 0.0,
        health=health,
    )


def _accumulate(state: TrainState, rows: Tensor, ranks: Ranks) -> _Tally:
    train = state.config.train
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
    microbatches = share(rows, parts=train.accumulation_steps, rank=ranks.rank, world=ranks.world)
    tallies = []
    for microbatch in microbatches:
        with autocast(train.precision, state.device.type):
            output = state.model(microbatch[:, :-1], mtp=train.mtp_loss_weight > 0)
        losses = loss_parts(output, microbatch, state.config, ranks.mean)
        (losses["total"] * (scale / len(microbatches))).backward()
        tallies.append(_tally(losses, output, state))
    return _Tally(
        losses={name: torch.stack([tally.losses[name] for tally in tallies]).mean() for name in tallies[0].losses},
        kept=torch.stack([tally.kept for tally in tallies]).sum(dim=0),
        counts=torch.stack([tally.counts for tally in tallies]).sum(dim=0),
        demand=tuple(torch.stack(layer).sum(dim=0) for layer in zip(*(tally.demand for tally in tallies), strict=True)),
    )


def _tally(losses: dict[str, Tensor], output: ModelOutput, state: TrainState) -> _Tally:
    counts = [routing.counts for routing in output.routing]
    kept = [routing.counts.sum() if routing.kept is None else routing.kept.sum() for routing in output.routing]
    # depths left out of a step have no routing
    demanded = [layer.demand(routing) for layer, routing in zip(state.expert_layers, output.routing, strict=False)]
    none = torch.zeros(0, 1, dtype=torch.int64, device=losses["total"].device)
    return _Tally(
        losses={name: value.detach().double() for name, value in losses.items()},
        kept=torch.stack(kept) if kept else none[:, 0],
        counts=torch.stack(counts) if counts else none,
        demand=tuple(asked for asked in demanded if asked is not None),
    )


def _over_ranks(tally: _Tally, ranks: Ranks) -> _Tally:
    means = ranks.sum(torch.stack(list(tally.losses.values()))) / ranks.world
    return _Tally(
        losses=dict(zip(tally.losses, means, strict=True)),
        kept=ranks.sum(tally.kept),
        counts=ranks.sum(tally.counts),
        demand=tuple(map(ranks.sum, tally.demand)),
    )


def _update(state: TrainState, tally: _Tally, ranks: Ranks) -> tuple[float, str]:
    ranks.average_gradients(state.model.parameters())
    parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    reason: str | None = None
    if state.loss_scale is not None:
        scaled = unscale(gradients, state.loss_scale)
        state.loss_scale, reason = update(state.loss_scale, scaled), scaled
    norm = clip(state.model, state.config.train.clip_grad_norm)
    if reason is None and not math.isfinite(norm):
        reason = "gradient that is not finite"
    if reason is None:
        state.optimizer.step()
        loads = tuple(tally.counts)
        for layer, asked, counts in zip(state.expert_layers, tally.demand or loads, loads, strict=False):
            if any(weight.requires_grad for weight in layer.parameters()):  # a frozen router keeps its bias too
                layer.update_bias(asked)
                layer.update_capacity(counts)
    state.optimizer.zero_grad(set_to_none=True)
    return norm, "ok" if reason is None else f"skipped: {reason}"


def clip(model: Transformer, most: float) -> float:
    """Clip the gradients there are, those of the indexers by themselves; the norm of the whole before clipping."""
    learning = {id(parameter) for indexer in indexers(model) for parameter in indexer.parameters()}
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in model.parameters():
        if parameter.grad is not None:
            groups[id(parameter) in learning].append(parameter)
    return math.hypot(*(torch.nn.utils.clip_grad_norm_(group, most).item() for group in groups if group))
