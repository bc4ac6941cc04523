"""A byte language model, and what it has learnt on the way.

    trailing   the loss over the last quarter of each row, where only what was said long before can still help

The rate of learning is constant after a short rise, so that a run that ends early is no other run cut short, and every
look is fair at its own number of tokens. Looks are at a moving average of the weights: the constant rate leaves noise
in them that a fall would have taken out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.training import sick_steps
from dsv3.config import Config
from dsv3.data.pack import Batches, heldout_rows
from dsv3.data.prepare import Prepared
from dsv3.model import Transformer
from dsv3.train import TrainState, train_step

AVERAGED = 0.95  # of the weights stays at each step: an average over about twenty
TRAILING = 4  # the last fourth of a row


@dataclass(frozen=True, kw_only=True)
class Look:
    """The averaged model after some steps: nats per token over whole rows and trailing."""

    step: int
    loss: float
    trailing_loss: float


def learn(
    config: Config, prepared: Prepared, seed: int, *, steps: int, every: int, held_out: int
) -> tuple[list[Look], Transformer]:
    """Train some steps; looks at `held_out` validation rows every few of them and at the end, and the averaged model.

    Raises:
        FloatingPointError: when an update is not finite.
    """
    train = config.train
    state = TrainState.create(config, seed=seed)
    average = AveragedModel(state.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED))
    averaged = average.module
    assert isinstance(averaged, Transformer), "an average of models is one"
    batches = Batches(prepared.train, train.batch_size, train.sequence_length, seed)
    rows, _ = heldout_rows(prepared.validation, train.sequence_length, held_out)
    looks = list[Look]()
    while state.step < steps:
        if sick := sick_steps([train_step(state, batches.next())]):
            raise FloatingPointError(sick)
        average.update_parameters(state.model)
        if state.step % every == 0 or state.step == steps:
            looks.append(_look(averaged, rows, state.step))
    return looks, averaged


def _look(model: Transformer, rows: Int[Tensor, "R T1"], step: int) -> Look:
    nats = nats_of(lambda row: model.eval()(row).logits, rows)
    return Look(step=step, loss=nats.mean().item(), trailing_loss=last_part(nats).mean().item())


@torch.no_grad()
def nats_of(logits: Callable[[Tensor], Tensor], rows: Int[Tensor, "R T1"]) -> Float[Tensor, "R T"]:
    """-log p of every token of every row but the first, a row at a time."""
    return torch.cat(
        [F.cross_entropy(logits(row[None, :-1])[0], row[1:], reduction="none")[None].double() for row in rows]
    )


def last_part(nats: Float[Tensor, "R T"]) -> Float[Tensor, "R t"]:
    """The trailing positions."""
    return nats[:, -(nats.shape[1] // TRAILING) :]
