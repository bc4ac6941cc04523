"""What becomes of a token that finds its expert full: an expert takes C = min(ceil(N K / E * factor), N) of its tokens.

    probability    it keeps the tokens that want it most (largest gate weight), and drops the rest
    position       it keeps the tokens that come first in the batch, and drops the rest
    reroute        as probability; then, round by round, each token asks for every expert that refused it the next best
                   (score + bias) that it does not have and that has room; of those who ask, an expert takes the ones
                   that score it highest, and nobody loses a place. Dropped is what finds no room at all. A token's
                   weights are those that the router would have given to the experts it ends with

An adaptive capacity has for factor the moving average of past steps' largest loads, as multiples of the mean:

    a <- momentum a + (1 - momentum) max_i c_i / mean_i c_i    once a step, c over its microbatches and processes

It is infinite before the first step, which therefore drops nothing. A microbatch's loads are less even than the step's,
so that accumulation drops more.

Loads are counted before dropping: after it every overloaded expert looks exactly full, and neither a balancing bias nor
an average would see anything to correct.

Within a step only position is causal: otherwise a later token with a larger weight takes the place of an earlier one,
or fills the expert that one would have been sent to, so training sees the future. An average is of the past alone. The
article's "dynamic capacity, 1.2 x the mean load" is a fixed one: the mean load is N K / E whatever the router does.

Sources: GShard and Switch Transformer, arXiv 2006.16668 and 2101.03961 section 2.2 (position); Megatron-LM has both
ways of dropping.
"""

import math
from dataclasses import replace
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3.config import Adaptive, Fixed, MoE
from dsv3.moe.router import gate_weights, within_groups
from dsv3.moe.routing import Routing, count

Most = int | Int[Tensor, ""] | Float[Tensor, ""]


def expert_capacity(tokens: int, moe: MoE, factor: float) -> int:
    """The most that one expert takes of `tokens` tokens in the batch."""
    # Exact: in binary 20 * 1.1 is a little more than 22, and its ceiling 23.
    mean_load = Fraction(tokens * moe.num_experts_per_tok, moe.n_routed_experts)
    return min(math.ceil(mean_load * Fraction(repr(float(factor)))), tokens)


def adaptive_capacity(tokens: int, moe: MoE, average: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The same with an average for a factor; it stays where it is, since asking a device for a number waits for it."""
    mean_load = tokens * moe.num_experts_per_tok / moe.n_routed_experts
    # No load is above E times the mean; an infinite average would make NaN of a mean load of zero.
    return (mean_load * average.clamp(max=moe.n_routed_experts)).ceil().clamp(max=tokens)


@torch.no_grad()
def averaged(average: Float[Tensor, ""], counts: Int[Tensor, " E"], momentum: float) -> Float[Tensor, ""]:
    """The average after a step of these loads; as it was after one without tokens."""
    total = counts.sum()
    largest = (counts.amax() * len(counts) / total.clamp(min=1)).to(average.dtype)
    found = torch.where(average.isinf(), largest, torch.lerp(largest, average, momentum))
    return torch.where(total > 0, found, average)


def drop(
    routing: Routing,
    moe: MoE,
    capacity: Fixed | Adaptive,
    *,
    bias: Float[Tensor, " E"] | None = None,
    average: Float[Tensor, ""] | None = None,
) -> Routing:
    """The same routing with `kept` set: at most the capacity per expert, by the policy.

    `bias` is that of the selection, where the next best expert is wanted; `average`, of an adaptive capacity, the past.
    """
    tokens = len(routing.indices)
    if isinstance(capacity, Fixed):
        most: Most = expert_capacity(tokens, moe, capacity.factor)
    else:
        assert average is not None, "an adaptive capacity is a function of the past"
        most = adaptive_capacity(tokens, moe, average)
    priority = None if capacity.policy == "position" else routing.weights.detach()
    dropped = replace(routing, kept=place_in_queue(routing.indices, priority) < most)
    return reroute(dropped, moe, most, bias) if capacity.policy == "reroute" else dropped


def reroute(routing: Routing, moe: MoE, most: Most, bias: Float[Tensor, " E"] | None = None) -> Routing:
    """The same routing with the pairs that were refused sent on to experts with room, as far as there is any."""
    indices_NK, kept_NK = _send_on(routing, moe, most, bias)
    weights_NK = gate_weights(routing.scores, indices_NK, moe)
    return replace(routing, indices=indices_NK, weights=weights_NK, kept=kept_NK)


@torch.no_grad()
def _send_on(
    routing: Routing, moe: MoE, most: Most, bias: Float[Tensor, " E"] | None = None
) -> tuple[Int[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """Experts and `kept` after the rounds; a pair that finds no room keeps the expert that was chosen for it.

    A round that refuses somebody fills an expert, so that there are at most E + 1 rounds.
    """
    assert routing.kept is not None, "nothing is refused yet"
    experts = routing.scores.shape[1]
    some = (~routing.kept).any(dim=1).nonzero()[:, 0]  # M tokens that an expert refused
    scores_ME = routing.scores.detach()[some]
    ranked_ME = within_groups(scores_ME if bias is None else scores_ME + bias, moe)
    # The pairs of a token have no order of their own: the weightiest of those refused asks first.
    order = routing.weights[some].argsort(dim=1, descending=True, stable=True)
    indices_MK, kept_MK = (table[some].gather(1, order) for table in (routing.indices, routing.kept))
    has_ME = torch.zeros_like(scores_ME, dtype=torch.bool).scatter_(1, indices_MK, kept_MK)
    room_E = most - count(routing.indices[routing.kept], experts)
    while True:
        best = ranked_ME.masked_fill(has_ME | (room_E <= 0), float("-inf")).topk(indices_MK.shape[1], dim=1)
        nth_MK = ((~kept_MK).cumsum(dim=1) - 1).clamp(min=0)
        asked_MK = best.indices.gather(1, nth_MK)
        asks_MK = ~kept_MK & best.values.gather(1, nth_MK).isfinite()
        if not asks_MK.any():
            return routing.indices.index_copy(0, some, indices_MK), routing.kept.index_copy(0, some, kept_MK)
        queue = asked_MK.masked_fill(~asks_MK, experts)
        taken_MK = asks_MK & (place_in_queue(queue, scores_ME.gather(1, asked_MK)) < room_E[asked_MK])
        indices_MK, kept_MK = torch.where(taken_MK, asked_MK, indices_MK), kept_MK | taken_MK
        has_ME[taken_MK.nonzero()[:, 0], asked_MK[taken_MK]] = True
        room_E = room_E - count(asked_MK[taken_MK], experts)


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
