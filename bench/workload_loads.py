"""What a routing workload does to a layer of experts, counted: balance, drops, and what layers have in common.

A workload goes the way of a router: its draw becomes a `Routing`, capacity drops from it, and the meters of load read
it. Figures of a step are those of one layer. Of several layers it is asked how near their counts come to the closed
form, how many experts of a token two of them share, and what the busiest rank has of all of them together: there a
router that prefers the same experts in every layer is worse than one whose favourites differ.
"""

from collections.abc import Sequence
from statistics import fmean

import torch

from bench.meters.load import load, of_batches
from bench.routing_workloads import Workload, draw, squared_deviation
from dsv3.config import Fixed, MoE
from dsv3.moe import Routing
from dsv3.moe.capacity import drop
from dsv3.moe.load import rank_max_vio
from dsv3.moe.routing import count


def routing(workload: Workload, *, step: int, layer: int = 0) -> Routing:
    """What a router would return that had decided so: it scores the experts of a token by their gate weights, others
    0.
    """
    drawn = draw(workload, step=step, layer=layer)
    indices, weights = torch.from_numpy(drawn.indices), torch.from_numpy(drawn.weights)
    scores = weights.new_zeros(workload.tokens, workload.experts).scatter_(1, indices, weights)
    return Routing(indices=indices, weights=weights, scores=scores, counts=count(indices, workload.experts))


def of_step(workload: Workload, *, step: int, ranks: int, factor: float) -> dict[str, float]:
    """Figures of one layer's loads, with a capacity of `factor` mean loads, and of ranks of neighbouring experts."""
    capacity = Fixed(factor=factor)
    moe = MoE(
        n_routed_experts=workload.experts,
        num_experts_per_tok=workload.k,
        moe_intermediate_size=1,
        capacity=capacity,
    )
    routed = routing(workload, step=step)
    of_layer = {found.metric: float(found.value) for found in load(drop(routed, moe, capacity), moe)}
    return of_layer | of_batches([routed.counts[None]], workload.k, ranks=ranks)


def of_layers(workload: Workload, *, layers: int, ranks: int, steps: Sequence[int]) -> dict[str, float]:
    """Means over steps: the squared deviation of each layer's loads, and MaxVio of the ranks' loads of all layers
    together.
    """
    deviations, together = [], []
    for step in steps:
        counts = [_counts(workload, step, layer) for layer in range(layers)]
        deviations += [
            squared_deviation(workload, found.numpy(), step=step, layer=layer) for layer, found in enumerate(counts)
        ]
        together.append(rank_max_vio(torch.stack(counts).sum(dim=0), ranks))
    return {"squared_load_deviation": fmean(deviations), "rank_max_vio": fmean(together)}


def overlap(workload: Workload, *, apart: int, steps: Sequence[int]) -> float:
    """How many experts of a token two layers share that are so far apart, mean over tokens and steps."""
    shared = []
    for step in steps:
        below, above = (draw(workload, step=step, layer=layer).indices for layer in (0, apart))
        shared.append(float((below[:, :, None] == above[:, None, :]).sum(axis=(1, 2)).mean()))
    return fmean(shared)


def _counts(workload: Workload, step: int, layer: int) -> torch.Tensor:
    return count(torch.from_numpy(draw(workload, step=step, layer=layer).indices), workload.experts)
