"""The loss of a batch, part by part, in nats:

    main        mean over positions of -log p(next token)
    mtp         mean over depths m of the mean over positions of -log p(token m further)
    balance_*   the routers' losses, each times its alpha, summed over the expert layers
    indexer     mean over positions of the KL divergence of an indexer from its attention, times loss_weight, summed
                over the layers
    distilled   the same of the scores of seen blocks, where a choice of blocks is distilled
    total       main + mtp_loss_weight * mtp + sum of balance_* + indexer or distilled

Equations 24 and 25 of arXiv 2412.19437 (section 2.2), and the equations in `dsv3.moe.balance`,
`dsv3.attention.select.distillation` and `dsv3.attention.select.learning`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dsv3.config import Blocks, Config, Indexer, Select
from dsv3.model import ModelOutput
from dsv3.moe import balance_losses

Mean = Callable[[Tensor], Tensor]


def loss_parts(
    output: ModelOutput, rows: Int[Tensor, "B T1"], config: Config, mean: Mean
) -> dict[str, Float[Tensor, ""]]:
    """The parts by name, "total" last.

    `output` is the model's on rows[:, :-1]; `mean` averages a statistic over processes.
    """
    parts = {"main": cross_entropy(output.logits, rows[:, 1:])}
    total = parts["main"]
    if output.mtp_logits:
        depths = [cross_entropy(logits, rows[:, 1 + m :]) for m, logits in enumerate(output.mtp_logits, start=1)]
        parts["mtp"] = torch.stack(depths).mean()
        total = total + config.train.mtp_loss_weight * parts["mtp"]
    for routing in output.routing:
        assert config.model.moe is not None, "a routing comes from a model with experts"
        for name, value in balance_losses(routing, config.model.moe, len(rows), mean).items():
            named = f"balance_{name}"
            parts[named] = parts[named] + value if named in parts else value
            total = total + value
    select = config.model.attention.select
    learning = selection_loss(output, select)
    if learning is not None:
        parts["indexer" if isinstance(select, Indexer) else "distilled"] = learning
        total = total + learning
    return parts | {"total": total}


def selection_loss(output: ModelOutput, select: Select) -> Float[Tensor, ""] | None:
    """By which the choices of all layers learn, times its weight; None where none has a loss of its own."""
    losses = [selection.loss for selection in output.selection if selection is not None and selection.loss is not None]
    if not losses:
        return None
    assert isinstance(select, (Indexer, Blocks)), "other choices have no loss of their own"
    return select.loss_weight * torch.stack(losses).sum()


def cross_entropy(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean of -log softmax(logits)[target], in at least float32."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten())
