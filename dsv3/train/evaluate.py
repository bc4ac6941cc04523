"""Bits per byte of held-out text: -log2 p(tokens) over the bytes that they stand for.

So models with different tokenizers compare. Rows are spread evenly over a split, the first token of each is given and
the others are predicted, experts drop nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dsv3.config import Precision
from dsv3.data.baseline import bits_per_byte
from dsv3.data.pack import heldout_rows
from dsv3.data.prepare import Prepared, Split
from dsv3.model import Transformer
from dsv3.parallel import ALONE, Ranks
from dsv3.precision import autocast


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows [R, T + 1] of a split, the domain each begins in, and the bytes that its targets stand for."""

    rows: Tensor
    domains: Tensor
    names: tuple[str, ...]
    text_bytes: Tensor

    @classmethod
    def of(cls, prepared: Prepared, split: Split, *, length: int, count: int) -> "HeldOut":
        """At most `count` rows of `length` targets."""
        rows, domains = heldout_rows(split, length, count)
        text_bytes = torch.from_numpy(prepared.bytes_per_token)[rows[:, 1:]].sum(dim=1)
        return cls(rows=rows, domains=domains, names=prepared.domains, text_bytes=text_bytes)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The model after `step` steps on held-out text: bits per byte of all of it and of each domain in it.

    `nats_per_token` is the same loss in the unit of training; it depends on the tokenizer.
    """

    step: int
    bits_per_byte: float
    nats_per_token: float
    by_domain: dict[str, float]


@torch.no_grad()
def evaluate(
    model: Transformer, heldout: HeldOut, *, step: int, batch_size: int, precision: Precision, ranks: Ranks = ALONE
) -> Evaluation:
    """Evaluate `model` on `heldout`; the processes share the rows. The model's training mode is put back."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = torch.zeros(len(heldout.rows), dtype=torch.float64, device=device)
    for chosen in torch.arange(ranks.rank, len(nats), ranks.world).split(batch_size):
        nats[chosen] = _row_nats(model, heldout.rows[chosen].to(device), precision)
    nats = ranks.sum(nats).cpu()
    model.train(was_training)

    def measured(rows: Tensor) -> float:
        return bits_per_byte(nats[rows].sum().item(), int(heldout.text_bytes[rows].sum()))

    present = {name: heldout.domains == index for index, name in enumerate(heldout.names)}
    return Evaluation(
        step=step,
        bits_per_byte=measured(torch.ones_like(heldout.domains, dtype=torch.bool)),
        nats_per_token=nats.sum().item() / heldout.rows[:, 1:].numel(),
        by_domain={name: measured(rows) for name, rows in present.items() if rows.any()},
    )


def _row_nats(model: Transformer, rows: Int[Tensor, "B T1"], precision: Precision) -> Float[Tensor, " B"]:
    with autocast(precision, rows.device.type):
        logits = model(rows[:, :-1], mtp=False).logits
    nats = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return nats.view(len(rows), -1).double().sum(dim=1)
