"""A training whose routing is looked at: loads on the way, as training has them, and at the end on text it never saw.

    on the way    the step's own batch, before its update: experts that choose tokens choose, biases are as they stand
    at the end    held-out rows with the bias frozen and nothing dropped, each token for itself, as a model is used: no
                  later token has a say, whatever training allowed

Looks are forward passes of their own. Counting inside those of the training would count a recomputed activation twice.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bench.training import sick_steps
from dsv3.config import Config
from dsv3.data.pack import Batches
from dsv3.data.prepare import Prepared
from dsv3.model import Transformer
from dsv3.moe.routing import count
from dsv3.train import TrainState, train_step
from dsv3.train.evaluate import HeldOut, evaluate

EVALUATED = 16  # rows at a time


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What a training came to.

    Attributes:
        on_the_way: tokens of each expert in each layer [L, E], by the step before which it was looked.
        held_out: the same of each held-out row, [S, L, E].
        loss: nats per held-out token.
    """

    on_the_way: Mapping[int, Int[Tensor, "L E"]]
    held_out: Int[Tensor, "S L E"]
    loss: float


def routed(config: Config, prepared: Prepared, seed: int, looks: Collection[int]) -> Routed:
    """Train all steps of the config from the seed's weights; `looks` are steps, counted from 1.

    Raises:
        FloatingPointError: when an update is not finite.
    """
    train = config.train
    state = TrainState.create(config, seed=seed)
    batches = Batches(prepared.train, train.batch_size, train.sequence_length, seed)
    on_the_way = dict[int, Tensor]()
    for step in range(1, train.steps + 1):
        rows = batches.next()
        if step in looks:
            on_the_way[step] = loads(state.model.train(), rows).sum(dim=0)
        if sick := sick_steps([train_step(state, rows)]):
            raise FloatingPointError(sick)
    heldout = HeldOut.of(prepared, prepared.validation, length=train.sequence_length, count=train.eval_sequences)
    found = evaluate(
        state.model,
        heldout,
        step=state.step,
        batch_size=min(EVALUATED, train.eval_sequences),
        precision=train.precision,
    )
    return Routed(on_the_way=on_the_way, held_out=loads(state.model.eval(), heldout.rows), loss=found.nats_per_token)


@torch.no_grad()
def loads(model: Transformer, rows: Int[Tensor, "S T1"]) -> Int[Tensor, "S L E"]:
    """Tokens per expert of each row in each layer, before anything is dropped, as the model's mode has it."""
    parts = rows.split(len(rows) if model.training else EVALUATED)
    return torch.cat([_loads(model, part) for part in parts])


def _loads(model: Transformer, rows: Tensor) -> Tensor:
    layers = []
    for routing in model(rows[:, :-1], mtp=False).routing:
        indices, experts = routing.indices, len(routing.counts)
        if indices.shape[1] == experts and routing.kept is not None:
            indices = indices.masked_fill(~routing.kept, experts)  # experts choose: what they leave is no load
        each = [count(row, experts + 1)[:experts] for row in indices.view(len(rows), -1)]
        layers.append(torch.stack(each))
    return torch.stack(layers, dim=1)
