"""Ten steps of plain descent, alone or as one of several processes (`torchrun ... trajectory.py OUT`).

All balance losses are on, so that batch statistics matter. The file that rank 0 writes holds the losses of each step,
the gradient of the first, the loads' MaxVio, the final weights, and how far each router's choice was from being another
one.
"""

import os
import sys
from typing import Any

import torch

from dsv3.config import QuadraticLoss, SequenceLoss, SignBias, SwitchLoss
from dsv3.parallel import ALONE, Ranks, joined
from dsv3.train.state import TrainState
from dsv3.train.step import train_step
from tests.train import small

SEED = 0
MICROBATCHES = (1, 2)
BALANCE = (SignBias(rate=0.01), SequenceLoss(alpha=0.1), SwitchLoss(alpha=0.1), QuadraticLoss(alpha=0.1))


def trajectory(ranks: Ranks = ALONE, accumulation_steps: int = 1) -> dict[str, Any]:
    """Train and report."""
    config = small.config(BALANCE, **{"train.accumulation_steps": accumulation_steps})
    state = TrainState.create(config, seed=SEED)
    gradients: list[dict[str, torch.Tensor]] = []
    state.optimizer.register_step_pre_hook(lambda *_: gradients.append(gradients_of(state)))
    reports, margins = [], []
    for rows in small.rows(config, seed=SEED, batches=config.train.steps):
        margins.append(margin(state, rows))
        reports.append(train_step(state, rows, ranks=ranks))
    return {
        "losses": [report.losses for report in reports],
        "max_vio": [report.max_vio for report in reports],
        "gradient": gradients[0],
        "weights": state.model.state_dict(),
        "margin": min(margins),
    }


def gradients_of(state: TrainState) -> dict[str, torch.Tensor]:
    """A copy of the gradients by name."""
    named = state.model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def margin(state: TrainState, rows: torch.Tensor) -> float:
    """The least distance, over all tokens and routers, between the worst expert chosen and the best one left out."""
    state.model.train()
    with torch.no_grad():
        routings = state.model(rows[:, :-1]).routing
    gaps = []
    for routing, layer in zip(routings, state.expert_layers, strict=True):
        ranked = (routing.scores + layer.gate.e_score_correction_bias).sort(dim=1, descending=True).values
        k = routing.indices.shape[1]
        gaps.append((ranked[:, k - 1] - ranked[:, k]).min().item())
    return min(gaps)


def write(out: str) -> None:
    """Train with each number of microbatches, as one of several."""
    with joined(os.environ, torch.device("cpu")) as here:
        results = [trajectory(here, parts) for parts in MICROBATCHES]
        if here.first:
            torch.save(results, out)


if __name__ == "__main__":
    # In a function, so that the process group goes with its last name and waits for its threads. One that were still
    # letting go of the last tensor as Python ends would abort the process.
    write(sys.argv[1])
