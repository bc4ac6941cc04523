"""The router: score every expert for every token, choose K of them, weigh them.

    logits = W x                                     in float32, whatever the model's precision
    s      = sigmoid(logits) | softmax(logits)
    choose   the K best of s + bias, among the topk_group groups whose two best s + bias add up to most
    w      = s[chosen];  w / (sum w + 1e-20) if norm_topk_prob;  x routed_scaling_factor

The bias steers the choice and never enters a weight (DeepSeek-V3, arXiv 2412.19437 section 2.1.2, equations 12 to 16).
Experts outside the chosen groups are set to -inf: with zero they would beat an expert whose biased score is negative.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config import MoE, SimilarityLoss, ZLoss
from dsv3.moe.routing import Routing, count

EXPERTS_THAT_SCORE_A_GROUP = 2
NORMALISATION_FLOOR = 1e-20


def route(x: Float[Tensor, "N D"], weight: Float[Tensor, "E D"], bias: Float[Tensor, " E"], moe: MoE) -> Routing:
    """Route tokens `x` with the router's `weight` and selection `bias`.

    Raises:
        ValueError: on a CPU, when a score is NaN (a NaN in x or in the weight, or softmax of an infinite logit). On an
            accelerator the check would empty its queue in every layer; there a NaN, which top-K always selects, reaches
            the loss, where a training step looks for it.
    """
    kinds = {type(method) for method in moe.balance}
    if SimilarityLoss in kinds:  # one copy for the logits and the loss
        weight = weight.to(torch.promote_types(x.dtype, torch.float32))
    logits_NE = router_logits(x, weight)
    scores_NE = score(logits_NE, moe)
    _refuse_nan(scores_NE)
    indices_NK = select(scores_NE.detach() + bias, moe)
    weights_NK = gate_weights(scores_NE, indices_NK, moe)
    return Routing(
        indices_NK,
        weights_NK,
        scores_NE,
        count(indices_NK, moe.n_routed_experts),
        logits=logits_NE if ZLoss in kinds else None,
        router=weight if SimilarityLoss in kinds else None,
    )


def router_logits(x: Float[Tensor, "N D"], weight: Float[Tensor, "E D"]) -> Float[Tensor, "N E"]:
    """One logit per token and expert, in float32 or better: near-ties between experts are too close for bfloat16."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


def score(logits: Float[Tensor, "N E"], moe: MoE) -> Float[Tensor, "N E"]:
    """Scores in [0, 1]: each expert by itself (sigmoid) or against the others (softmax)."""
    return logits.sigmoid() if moe.scoring_func == "sigmoid" else logits.softmax(dim=-1)


def select(biased: Float[Tensor, "N E"], moe: MoE) -> Int[Tensor, "N K"]:
    """The `num_experts_per_tok` best experts by biased score, inside the best groups when experts are grouped."""
    return within_groups(biased, moe).topk(moe.num_experts_per_tok, dim=-1, sorted=False).indices


def within_groups(biased: Float[Tensor, "N E"], moe: MoE) -> Float[Tensor, "N E"]:
    """The biased scores, -inf outside a token's best groups when experts are grouped."""
    return _only_best_groups(biased, moe) if moe.n_group > 1 else biased


def gate_weights(scores: Float[Tensor, "N E"], indices: Int[Tensor, "N K"], moe: MoE) -> Float[Tensor, "N K"]:
    """The weights of the chosen experts, from scores without bias."""
    weights_NK = scores.gather(1, indices)
    if moe.norm_topk_prob:
        weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + NORMALISATION_FLOOR)
    return weights_NK * moe.routed_scaling_factor


def _only_best_groups(biased_NE: Tensor, moe: MoE) -> Tensor:
    grouped = biased_NE.unflatten(1, (moe.n_group, -1))
    group_scores = grouped.topk(EXPERTS_THAT_SCORE_A_GROUP, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(moe.topk_group, dim=-1, sorted=False).indices
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)


def _refuse_nan(scores_NE: Tensor) -> None:
    if scores_NE.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # Scores lie in [0, 1], so their sum is finite unless one of them is NaN.
    if not scores_NE.detach().sum().isfinite():
        bad = int(scores_NE.isnan().any(dim=1).nonzero()[0])
        raise ValueError(
            f"scores of token {bad}=nan: router logits must not be NaN, nor infinite under softmax; "
            "look for a diverged weight or a NaN in the layer's input"
        )
