"""Keeping the experts equally busy by losses; what moves the selection bias is in `dsv3.moe.bias`.

With p_ni = s_ni / (sum_j s_nj + 1e-20), the normalised score of expert i for token n, and loads counted before any
drop:

    SequenceLoss     alpha * sum_i f_i P_i per sequence, averaged over sequences
                     P_i = mean_t p_ti,   f_i = E / (K T) * number of t with i in the top-K of s_t
    SwitchLoss       alpha * E * sum_i f_i P_i over the batch,   P_i = mean_n p_ni,   f_i = load_i / (N K)
    QuadraticLoss    alpha * sum_i (P_i - 1/E)^2 over the batch
    SimilarityLoss   alpha * sum_ij |(W W^T - I)_ij| of the router's weight W [E, D], one row an expert
    ZLoss            alpha * mean_n (log sum_i exp logit_ni)^2, which balances nothing: it keeps logits small

The first two equal alpha when every expert has the same load and probability. The top-K of the sequence loss is of the
scores alone, without bias and groups (arXiv 2412.19437 equations 17 to 20). Switch (arXiv 2101.03961 equations 4 to 6)
has K = 1; dividing by K keeps its scale. The article's quadratic loss has no f at all: it is zero for equal mean
probabilities, however skewed the loads are. SimBal's (arXiv 2506.14038, here with R = W^T) sees neither: an orthogonal
router keeps the angles between tokens, and spreads tokens that point everywhere. It needs E <= D to reach zero.

A batch without tokens, as one of padding is, has P_i = 1/E and no load: but for SimBal's, which is of the weight alone,
its losses are 0, and so are their gradients.

When several processes share a batch, `mean` replaces a batch statistic by its mean over them: the room knows no process
group. Switch's loss with it is the global-batch loss (arXiv 2501.11873): one sequence or process may be one-sided where
all together are even. Its batch is what the processes hold at once, so accumulation makes it smaller.
"""

from collections.abc import Callable
from typing import assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config import (
    CentredSignBias,
    ExpertChoice,
    MoE,
    ProportionalBias,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SimilarityLoss,
    SwitchLoss,
    ZLoss,
)
from dsv3.moe.router import NORMALISATION_FLOOR
from dsv3.moe.routing import Routing, count

Mean = Callable[[Tensor], Tensor]


def alone(statistic: Tensor) -> Tensor:
    """The mean over one process: the statistic itself."""
    return statistic


def balance_losses(routing: Routing, moe: MoE, batch: int, mean: Mean = alone) -> dict[str, Float[Tensor, ""]]:
    """The losses that `moe.balance` asks for, by name and times their alpha; the tokens make up `batch` sequences.

    `mean` has the value of the mean over processes and the gradient of the local statistic; the gradients of the
    processes are then averaged as for any other loss.
    """
    losses: dict[str, Tensor] = {}
    for method in moe.balance:
        match method:
            case SequenceLoss(alpha=alpha):
                losses["sequence"] = alpha * sequence_loss(routing, batch)
            case SwitchLoss(alpha=alpha):
                losses["switch"] = alpha * switch_loss(routing, mean)
            case QuadraticLoss(alpha=alpha):
                losses["quadratic"] = alpha * quadratic_loss(routing, mean)
            case SimilarityLoss(alpha=alpha):
                losses["similarity"] = alpha * similarity_loss(routing)
            case ZLoss(alpha=alpha):
                losses["z"] = alpha * z_loss(routing)
            case SignBias() | CentredSignBias() | ProportionalBias() | QuantileBias() | ExpertChoice():
                pass
            case _:
                assert_never(method)
    return losses


def probabilities(routing: Routing) -> Float[Tensor, "N E"]:
    """Scores normalised over the experts, as gate weights are over the chosen; softmax scores already are."""
    return routing.scores / (routing.scores.sum(dim=-1, keepdim=True) + NORMALISATION_FLOOR)


def mean_probabilities(routing: Routing) -> Float[Tensor, " E"]:
    """Their mean over the tokens; without tokens no expert is preferred, and all have 1 / E."""
    p_NE = probabilities(routing)
    return p_NE.mean(dim=0) if len(p_NE) else p_NE.sum(dim=0) + 1 / p_NE.shape[1]


def sequence_loss(routing: Routing, batch: int) -> Float[Tensor, ""]:
    """DeepSeek-V3's loss within a sequence, averaged over `batch` sequences; 1 at perfect balance."""
    if routing.lengths is not None:
        return _ragged_sequence_loss(routing, routing.lengths)
    tokens, experts = routing.scores.shape
    k, length = routing.indices.shape[1], tokens // max(batch, 1)
    assert tokens == batch * length, f"{tokens} tokens do not make {batch} sequences of equal length"
    if tokens == 0:
        return probabilities(routing).sum()  # zero, and still a function of the scores
    chosen = routing.scores.detach().topk(k, dim=-1, sorted=False).indices.view(batch, length * k)
    load_BE = torch.zeros(batch, experts, dtype=routing.scores.dtype, device=chosen.device)
    load_BE.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=load_BE.dtype))
    f_BE = load_BE * (experts / (k * length))
    p_BE = probabilities(routing).view(batch, length, experts).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()


def _ragged_sequence_loss(routing: Routing, lengths: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """The same of sequences of unequal length; one without tokens is left out."""
    experts, k = routing.scores.shape[1], routing.indices.shape[1]
    sequence_N = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    chosen = routing.scores.detach().topk(k, dim=-1, sorted=False).indices
    load_BE = count(sequence_N[:, None] * experts + chosen, len(lengths) * experts).view(len(lengths), experts)
    total_BE = routing.scores.new_zeros(load_BE.shape).index_add(0, sequence_N, probabilities(routing))
    length_B1 = lengths.clamp(min=1).to(total_BE.dtype)[:, None]
    f_BE = load_BE * (experts / k) / length_B1
    return (f_BE * total_BE / length_B1).sum() / (lengths > 0).sum().clamp(min=1)


def switch_loss(routing: Routing, mean: Mean = alone) -> Float[Tensor, ""]:
    """Switch Transformer's loss over the batch; 1 at perfect balance."""
    tokens, experts = routing.scores.shape
    f_E = mean(routing.counts.to(routing.scores.dtype) / (max(tokens, 1) * routing.indices.shape[1]))
    return experts * (f_E * mean(mean_probabilities(routing))).sum()


def quadratic_loss(routing: Routing, mean: Mean = alone) -> Float[Tensor, ""]:
    """The article's loss over the batch; 0 when the mean probabilities are equal."""
    p_E = mean(mean_probabilities(routing))
    return (p_E - 1 / len(p_E)).square().sum()


def similarity_loss(routing: Routing) -> Float[Tensor, ""]:
    """SimBal's loss; 0 where the experts' rows of the router are orthogonal and of length 1."""
    assert routing.router is not None, "a router shows its weight where the config has a SimilarityLoss"
    gram_EE = routing.router @ routing.router.t()
    return (gram_EE - torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)).abs().sum()


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """ST-MoE's loss (arXiv 2202.08906 equation 5): the mean squared logarithm of the softmax's denominator."""
    assert routing.logits is not None, "a router keeps its logits where the config has a ZLoss"
    squared_N = routing.logits.logsumexp(dim=-1).square()
    return squared_N.mean() if len(squared_N) else squared_N.sum()
