"""What an expert does when it is full: of its tokens it keeps min(ceil(N K / E * factor), N) and drops the rest.

    probability    it keeps the tokens that want it most (largest gate weight)
    position       it keeps the tokens that come first in the batch

Sources: GShard and Switch Transformer, arXiv 2006.16668 and 2101.03961 section 2.2 (position); Megatron-LM has both.
Loads are counted before dropping: after it every overloaded expert looks exactly full, and a balancing bias would see
nothing to correct.

Dropping by probability is not causal: a later token with a larger weight takes the place of an earlier one, so training
sees the future. The article's "dynamic capacity, 1.2 x the mean load" is a fixed one: the mean load is N K / E whatever
the router does.
"""

import math
from dataclasses import replace
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config import Fixed, MoE
from dsv3.moe.routing import Routing


def expert_capacity(tokens: int, moe: MoE, factor: float) -> int:
    """The most that one expert takes of `tokens` tokens in the batch."""
    # Exact: in binary 20 * 1.1 is a little more than 22, and its ceiling 23.
    mean_load = Fraction(tokens * moe.num_experts_per_tok, moe.n_routed_experts)
    return min(math.ceil(mean_load * Fraction(repr(float(factor)))), tokens)


def drop(routing: Routing, moe: MoE, fixed: Fixed) -> Routing:
    """The same routing with `kept` set: at most the capacity per expert, chosen by the policy."""
    capacity = expert_capacity(len(routing.indices), moe, fixed.factor)
    priority = routing.weights.detach() if fixed.policy == "probability" else None
    return replace(routing, kept=place_in_queue(routing.indices, priority) < capacity)


def place_in_queue(indices: Int[Tensor, "N K"], priority: Float[Tensor, "N K"] | None) -> Int[Tensor, "N K"]:
    """How many pairs come before each in its expert's queue, by falling priority and then by place in the batch."""
    flat = indices.flatten()
    order = torch.arange(len(flat), device=flat.device)
    if priority is not None:
        order = priority.flatten().argsort(descending=True, stable=True)
    by_expert = flat[order].argsort(stable=True)
    order = order[by_expert]
    queue = flat[order]
    first_of_expert = torch.searchsorted(queue, queue)
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat), device=flat.device) - first_of_expert
    return place.view_as(indices)
