"""AdamW in DeepSeek's grouping.

Matrices (embedding, head and stacked experts too) decay, vectors (norms, biases) do not.

The update runs fused where torch has the kernel: one pass over all parameters instead of a dozen per parameter.
"""

from typing import assert_never

import torch
from torch import nn

from dsv3.config import SGD, AdamW, Optimizer


def build(model: nn.Module, optimizer: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the config over the model's parameters."""
    match optimizer:
        case AdamW():
            return torch.optim.AdamW(
                decay_groups(model, optimizer.weight_decay),
                lr=optimizer.lr,
                betas=(optimizer.beta1, optimizer.beta2),
                eps=optimizer.eps,
                fused=True,
            )
        case SGD():
            return torch.optim.SGD(model.parameters(), lr=optimizer.lr)
        case _:
            assert_never(optimizer)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups of parameters: those of two or more dimensions, with decay, and the others, without."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
