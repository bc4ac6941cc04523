"""A small model trained on one of the tasks of recall: how often it answers right, and from which step.

    x = x + Attention(C(RMSNorm(x)))       C(x)_t = x_t + sum_i w_i * x_(t-i),  i = 0, 1, 2, per channel
    loss = cross-entropy at the positions with a label, and nowhere else; a choice may have its own besides
    rows of 1/8, 1/4, 1/2 of the length for a fifth of the steps each, then whole ones; as many tokens at every step

The model is this project's own but for C, a causal convolution before attention, as in Zoology's hybrids (arXiv
2312.04927): it tells a value which key stands before it. Without it two layers have first to grow a head that looks one
token back, which took longer than a cell may in the trials made; heads and rotary base differed in them too, so how
much is owed to C was not isolated. C stands before the choice of keys in every arm, so that it favours none. Short rows
come first, because on whole ones the gradient that tells the right key from all others is too faint to begin with; a
choice of keys prunes little in them, and arms are judged on whole rows alone.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bench.recall_tasks import LENGTHS, NO_LABEL, Batch, Split, Task, batch
from dsv3.config import Config, Select
from dsv3.model import ModelOutput, Transformer
from dsv3.model.block import Block
from dsv3.model.initialise import stream
from dsv3.train.loss import selection_loss
from dsv3.train.optimizer import build
from dsv3.train.schedule import share_of_peak
from dsv3.train.step import clip

TAPS, TAPS_STD = 3, 0.3
CRITERION = 0.99
VALIDATED = 2  # batches at each look
PARTS = (8, 4, 2, 1, 1)  # of a whole row that the rows of each fifth of the steps are


class ShortConvolution(nn.Module):
    """The sum of each channel with its last values, and the input itself; the start of a row sees zeros before it."""

    def __init__(self, width: int, seed: int, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TAPS, width))
        with torch.no_grad():
            self.weight.normal_(0.0, TAPS_STD, generator=stream(seed, "initialise", name))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Positions up to its own alone reach an output."""
        length = x.shape[1]
        before = F.pad(x, (0, 0, TAPS - 1, 0))
        for tap, weight in enumerate(self.weight):
            x = x + weight * before[:, TAPS - 1 - tap : TAPS - 1 - tap + length]
        return x


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a training came to.

    Attributes:
        accuracy: labelled positions of held-out rows where the likeliest token is the label.
        reached: the first look, in steps, at which validation rows had the criterion's accuracy; None if none did.
        share: (query, key) pairs that attention kept of those that causality leaves, on a held-out batch.
    """

    accuracy: float
    reached: int | None
    share: float


def model_of(config: Config, seed: int) -> Transformer:
    """The config's model with a convolution before each attention; arms of one seed share all weights they have."""
    model = Transformer(config.model, seed=seed)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block), "a transformer stacks blocks"
        convolution = ShortConvolution(config.model.hidden_size, seed, f"layers.{number}.convolution")
        layer.input_layernorm = nn.Sequential(layer.input_layernorm, convolution)  # type: ignore[assignment]
    return model


def learn(config: Config, task: Task, seed: int, *, look_every: int, held_out: int) -> Learnt:
    """Train from the seed's weights on its rows, all steps of the config; look at validation rows on the way.

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    train, model = config.train, model_of(config, seed)
    optimizer, reached = build(model, train.optimizer), None
    for step in range(1, train.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = train.optimizer.lr * share_of_peak(train.schedule, step, train.steps)
        short = at_step(task, step, train.steps)
        rows = train.batch_size * task.length // short.length
        loss = total_loss(model, batch(short, rows, seed=seed, step=step), config.model.attention.select)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss={loss.item()} at step {step}: must be finite; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        clip(model, train.clip_grad_norm)
        optimizer.step()
        if reached is None and step % look_every == 0:
            seen = accuracy(model, task, seed, "validation", batches=VALIDATED, rows=train.batch_size)
            reached = step if seen >= CRITERION else None
    found = accuracy(model, task, seed, "held_out", batches=held_out, rows=train.batch_size)
    share = kept_share(model, batch(task, 1, seed=seed, step=0, split="held_out"))
    return Learnt(accuracy=found, reached=reached, share=share)


def at_step(task: Task, step: int, steps: int) -> Task:
    """The task in rows as long as they are at `step` of 1 ... `steps`."""
    part = PARTS[(step - 1) * len(PARTS) // steps]
    return replace(task, length=max(LENGTHS[0], task.length // part))


def total_loss(model: Transformer, rows: Batch, select: Select) -> Tensor:
    """Nats per label, 0 for rows that ask nothing; and what a choice learns by."""
    output = model(torch.from_numpy(rows.tokens))
    logits, labels = answers(output, rows)
    asked = F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
    learning = selection_loss(output, select)
    return asked if learning is None else asked + learning


def answers(output: ModelOutput, rows: Batch) -> tuple[Float[Tensor, "n V"], Tensor]:
    """Logits and labels of the labelled positions."""
    labels = torch.from_numpy(rows.labels)
    asked = labels != NO_LABEL
    return output.logits[asked], labels[asked]


@torch.no_grad()
def accuracy(model: Transformer, task: Task, seed: int, split: Split, *, batches: int, rows: int) -> float:
    """Over the first `batches` of a split that is not trained on."""
    model.eval()
    right = total = 0
    for step in range(batches):
        held = batch(task, rows, seed=seed, step=step, split=split)
        logits, labels = answers(model(torch.from_numpy(held.tokens)), held)
        right += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
    model.train()
    return right / max(1, total)


@torch.no_grad()
def kept_share(model: Transformer, rows: Batch) -> float:
    """Over all layers; 1 where a layer keeps every key."""
    tokens = torch.from_numpy(rows.tokens)
    length = tokens.shape[1]
    visible = length * (length + 1) / 2
    shares = []
    for selection in model.eval()(tokens).selection:
        lists = 1 if selection is None else selection.counts.shape[0] * selection.counts.shape[1]
        shares.append(1.0 if selection is None else selection.cost.kept / (visible * lists))
    return sum(shares) / len(shares)
