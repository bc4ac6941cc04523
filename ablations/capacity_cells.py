"""What a cell of the capacity study does: it trains an arm and watches its routing, or times all capacities.

Not for import by a study's head: this needs torch.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ablations.study import Cell, Reading, Value
from bench.capacity import Limited, figures, frozen, past, refusals, routed, step_blocks
from bench.measurement import Measurement
from bench.meters.paired import Block, over_blocks, ratios, summary
from bench.meters.saved import saved_bytes
from bench.speed import rate
from dsv3.config import Adaptive, Capacity, Config, Dropless, digest
from dsv3.data.pack import Batches
from dsv3.data.prepare import Prepared, prepare
from dsv3.moe import MoELayer, Routing
from dsv3.train import TrainState, train_step
from dsv3.train.evaluate import HeldOut, evaluate

PAST = 10  # batches that an adaptive capacity has seen when it is timed


def trained(name: str, config: Config, cell: Cell, factors: tuple[float, ...]) -> list[Reading]:
    """The held-out loss of an arm, and the routing of its first and of its last steps; without a capacity also what one
    of each factor would refuse.
    """
    train, prepared = config.train, prepare(config.data, config.model.vocab_size)
    state, batches = _started(config, cell, prepared)
    tenth = max(1, train.steps // 10)
    seen: dict[str, list[dict[tuple[str, float], float]]] = {"early": [], "late": []}
    for step in range(train.steps):
        rows = batches.next().to(state.device)
        if step < tenth or step >= train.steps - tenth:
            seen["early" if step < tenth else "late"].append(_balance(routed(state, rows), factors))
        report = train_step(state, rows)
        if report.health != "ok":
            return [Reading(arm=name, metric="loss", failed=f"step {report.step}: {report.health}")]
    found: list[tuple[dict[str, Value], str, float]] = [({}, "loss", _loss(state, prepared))]
    for when, steps in seen.items():
        for metric, factor in steps[0]:
            axes: dict[str, Value] = {"routing": when} | ({"factor": factor} if factor else {})
            found.append((axes, metric, fmean(step[metric, factor] for step in steps)))
    labels: dict[str, Any] = {"arm": name, "config": digest(config), "corpus": prepared.digest}
    return [
        Reading(measurement=Measurement(metric=metric, value=value), axes=axes, **labels)
        for axes, metric, value in found
    ]


def _balance(layers: Sequence[tuple[MoELayer, Routing]], factors: tuple[float, ...]) -> dict[tuple[str, float], float]:
    """Figures of a batch, means over layers, by metric and factor: 0, or that of a capacity that is not there."""
    found = []
    for layer, routing in layers:
        one = {(metric, 0.0): value for metric, value in figures(layer, routing).items()}
        if isinstance(layer.moe.capacity, Dropless):
            asked = refusals(routing, layer.moe, factors)
            one |= {("refused_share", factor): share for factor, share in asked.items()}
        found.append(one)
    return {key: fmean(one[key] for one in found) for key in found[0]}


def _loss(state: TrainState, prepared: Prepared) -> float:
    """Nats per held-out token, nothing dropped."""
    train = state.config.train
    heldout = HeldOut.of(prepared, prepared.validation, length=train.sequence_length, count=train.eval_sequences)
    found = evaluate(state.model, heldout, step=state.step, batch_size=16, precision=train.precision)
    return found.nats_per_token


def timed(config: Config, cell: Cell, capacities: Mapping[str, Capacity], *, only_late: Sequence[str]) -> list[Reading]:
    """Bytes kept for backward and CPU time of a step under each capacity, on the weights of one dropless training:
    early, late and in balance, but those `only_late`.
    """
    train, prepared = config.train, prepare(config.data, config.model.vocab_size)
    unread = Batches(prepared.validation, train.batch_size, train.sequence_length, _seed(cell))
    arms = _limited(_started(config, cell, prepared), unread, capacities, only_late, _seed(cell))
    rows = unread.next()
    blocks = step_blocks({" ".join(key): arm for key, arm in arms.items()}, unread, int(cell.axes["blocks"]))
    return [
        Reading(arm=name, measurement=one, axes={"routing": routing})
        for (name, routing), arm in arms.items()
        for one in (*_times(blocks, name, routing, rows[:, 1:].numel()), *_counts(arm, rows))
    ]


def _limited(
    started: tuple[TrainState, Batches],
    unread: Batches,
    capacities: Mapping[str, Capacity],
    only_late: Sequence[str],
    seed: int,
) -> dict[tuple[str, str], Limited]:
    """By arm and routing, steps under a capacity. An adaptive one has just seen unread text, or nothing but balance."""
    state, batches = started
    steps = state.config.train.steps
    at = {max(1, steps // 10): "early", steps: "late"}
    arms: dict[tuple[str, str], Limited] = {}
    for step in range(1, steps + 1):
        train_step(state, batches.next().to(state.device))
        if step not in at:
            continue
        weights = frozen(state)
        for name, capacity in capacities.items():
            averages: tuple[Tensor, ...] = ()
            if isinstance(capacity, Adaptive):
                averages = tuple(past(weights, unread, PAST, capacity.momentum))
            if at[step] == "late" or name not in only_late:
                arms[name, at[step]] = Limited(weights, capacity, averages)
            if at[step] == "late" and name not in only_late:
                arms[name, "balanced"] = Limited(weights, capacity, tuple(map(torch.ones_like, averages)), seed)
    return arms


def _times(blocks: list[Block], name: str, routing: str, tokens: int) -> tuple[Measurement, ...]:
    """Times of an arm, against dropless as routed alike and against itself in forced balance."""
    key = f"{name} {routing}"
    found = summary(blocks, key, f"dropless {routing}", "step")
    found += (rate(found[1], "tokens_per_second", tokens),)
    if routing != "balanced" and f"{name} balanced" in blocks[0]:
        found += (over_blocks("routing_cpu_ratio", ratios(blocks, key, f"{name} balanced", "cpu")),)
    return found


def _counts(arm: Limited, rows: Tensor) -> tuple[Measurement, ...]:
    """Bytes kept; in forced balance also what is dropped and left empty, which training has no record of."""
    with arm.applied() as state:
        state.model.train()
        found = (saved_bytes(lambda: state.model(rows[:, :-1]), state.model.parameters()),)
        if arm.balanced is None or isinstance(arm.capacity, Dropless):
            return found
        seen = [figures(layer, routing) for layer, routing in routed(state, rows)]
    shares = ("drop_share", "empty_slot_share")
    return found + tuple(Measurement(metric=name, value=fmean(one[name] for one in seen)) for name in shares)


def _started(config: Config, cell: Cell, prepared: Prepared) -> tuple[TrainState, Batches]:
    """The model before its first step, and the text it reads: the same of every arm of a seed."""
    train = config.train
    state = TrainState.create(config, seed=_seed(cell), device=cell.device)
    return state, Batches(prepared.train, train.batch_size, train.sequence_length, _seed(cell))


def _seed(cell: Cell) -> int:
    assert cell.seed is not None, "every cell of this study has a seed"
    return cell.seed
