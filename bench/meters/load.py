"""Balance of a routing, as figures: `dsv3.moe.load` does the counting, this gives its results their names.

Figures of `load` are of one layer. Counts of several batches may be summed first; then `kept` is left out, since
dropping happens batch by batch. The others are of a model, from the loads [L, E] of its layers in each batch.
"""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from jaxtyping import Int
from torch import Tensor

from bench.measurement import Measurement
from dsv3.config import Fixed, MoE
from dsv3.config.rules import require
from dsv3.moe import Routing
from dsv3.moe.capacity import expert_capacity
from dsv3.moe.load import block_floor, drop_floor, load_statistics, rank_max_vio


def load(routing: Routing, moe: MoE) -> tuple[Measurement, ...]:
    """Balance of one layer's routing; with a fixed capacity also what it drops and what random routing would drop.

    Raises:
        ValueError: counts that are no sum over tokens times experts per token.
    """
    tokens, k = len(routing.indices), moe.num_experts_per_tok
    chosen = routing.indices.shape[1] > k  # experts choose among all pairs, and what they leave is not dropped
    found = load_statistics(routing.counts, k, None if chosen else routing.kept)
    figures = {
        "max_vio": found.max_vio,
        "excess_max_vio": found.excess_max_vio,
        "load_cv": found.cv,
        "gini": found.gini,
        "dead_experts": found.dead,
        "effective_experts": found.effective_experts,
        "drop_share": found.dropped,
    }
    if isinstance(moe.capacity, Fixed):
        capacity = expert_capacity(tokens, moe, moe.capacity.factor)
        figures["drop_floor"] = drop_floor(moe.n_routed_experts, k, tokens, capacity)
    # One token spread over all experts has a floor of zero, and no excess over it can be said.
    return tuple(Measurement(metric=name, value=value) for name, value in figures.items() if math.isfinite(value))


def of_batches(batches: Sequence[Int[Tensor, "L E"]], k: int, *, ranks: int) -> dict[str, float]:
    """Balance, means over batches and layers; experts are laid out on so many ranks."""
    found = [load_statistics(layer, k) for batch in batches for layer in batch]
    return {
        "max_vio": fmean(layer.max_vio for layer in found),
        "excess_cv_squared": fmean(layer.excess_cv_squared for layer in found),
        "gini": fmean(layer.gini for layer in found),
        "dead_experts": fmean(layer.dead for layer in found),
        "effective_experts": fmean(layer.effective_experts for layer in found),
        "rank_max_vio": fmean(rank_max_vio(layer, ranks) for batch in batches for layer in batch),
    }


def excess_over_layers(batches: Sequence[Int[Tensor, "L E"]], k: int) -> dict[str, float]:
    """Excess MaxVio, its mean over batches: the mean over layers, and how far the worse of them are."""
    each = [[load_statistics(layer, k).excess_max_vio for layer in batch] for batch in batches]
    layers = np.mean(each, axis=0)
    p50, p95 = np.percentile(layers, (50, 95))
    return {"mean": float(layers.mean()), "p50": float(p50), "p95": float(p95), "max": float(layers.max())}


def excess_over_blocks(rows: Int[Tensor, "S L E"], k: int, batch: int) -> float:
    """MaxVio of batches of so many rows, over that of a router that is even over all rows; a mean over layers."""
    layers = rows.unbind(dim=1)
    return fmean(
        fmean(load_statistics(part.sum(dim=0), k).max_vio for part in layer.split(batch)) / block_floor(layer, batch)
        for layer in layers
    )


def to_mean(counts: Int[Tensor, " E"]) -> list[float]:
    """Each expert's load as a multiple of the mean.

    Raises:
        ValueError: counts of no token.
    """
    rule = "must be of at least one token"
    require(bool(counts.any()), "counts", counts.tolist(), rule, "leave out batches without tokens")
    ratios: list[float] = (counts.double() / counts.double().mean()).tolist()
    return ratios
