"""Balance of a routing, as figures: `dsv3.moe.load` does the counting, this gives its results their names.

Figures are of one layer. Counts of several batches may be summed first; then `kept` is left out, since dropping happens
batch by batch.
"""

import math

from bench.measurement import Measurement
from dsv3.config import Fixed, MoE
from dsv3.moe import Routing
from dsv3.moe.capacity import expert_capacity
from dsv3.moe.load import drop_floor, load_statistics


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
