"""Moving the selection bias, without gradient, by what a whole step asked of the experts, after the optimizer's step.

    SignBias           b_i += rate * sign(mean load - load_i)
    CentredSignBias    the same, then minus the mean of b
    ProportionalBias   b_i += rate * (mean load - load_i) / mean load
    QuantileBias       b_i  = the value that a share K / E of the tokens has a_n - s_ni below, then minus the mean of b;
                              a_n is the (K + 1)-th largest s + b of token n

A token chooses expert i where s_ni + b_i passes a_n, so that b_i as the quantile gives expert i its fair share, were
the a_n to stay; since they move as all biases do, a few steps are needed. It has no rate to tune. Centring changes no
choice: only differences of biases are compared.

A step's demand is a sum over microbatches and processes: the loads, or for quantiles how often a_n - s_ni falls into
each of some bins for each expert. Scores lie in [0, 1], which bounds the bins by the bias that all processes have. The
exact quantile (no bins) needs every a_n - s_ni of a step at once, which no sum holds: its step is one microbatch of one
process, and configs and steps of more are refused. The bias is moved between steps, so that no token's experts depend
on a later token.

Sources: sign, arXiv 2408.15664; quantiles, J. Su 2026 and Megatron-LM, whose histograms have 1000 bins.
"""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from dsv3.config import CentredSignBias, MoE, ProportionalBias, QuantileBias, SignBias
from dsv3.moe.routing import Routing


@torch.no_grad()
def demand(routing: Routing, bias: Float[Tensor, " E"], moe: MoE) -> Num[Tensor, "E asked"] | None:
    """What `moved` has to know of a microbatch, to be summed over all of a step; None: its loads. Exact quantiles ask
    for margins, of a step that is one microbatch.
    """
    for method in moe.balance:
        match method:
            case QuantileBias(bins=None):
                return margins(routing.scores, bias, moe.num_experts_per_tok)
            case QuantileBias(bins=int(bins)):
                return histogram(routing.scores, bias, moe.num_experts_per_tok, bins)
    return None


@torch.no_grad()
def moved(bias: Float[Tensor, " E"], asked: Num[Tensor, "E ..."], moe: MoE) -> Float[Tensor, " E"]:
    """The bias after a step whose demand was `asked`; as it was without a method that moves it."""
    for method in moe.balance:
        match method:
            case SignBias(rate=rate):
                return sign_bias(bias, asked, rate)
            case CentredSignBias(rate=rate):
                found = sign_bias(bias, asked, rate)
                return found - found.mean()
            case ProportionalBias(rate=rate):
                return proportional_bias(bias, asked, rate)
            case QuantileBias(bins=bins, momentum=momentum):
                quantiles = quantile_bias if bins is None else histogram_bias
                found = quantiles(bias, asked, moe.num_experts_per_tok)
                return torch.lerp(found, bias, momentum)
    return bias


def sign_bias(bias: Float[Tensor, " E"], counts: Int[Tensor, " E"], rate: float) -> Float[Tensor, " E"]:
    """The bias after one step: overloaded experts lose `rate`, underloaded ones gain it, an expert at the mean stays.

    Any unit of load gives the same update, so counts may be sums over micro-batches and processes.
    """
    return bias + rate * _error(counts).sign().to(bias.dtype)


def proportional_bias(bias: Float[Tensor, " E"], counts: Int[Tensor, " E"], rate: float) -> Float[Tensor, " E"]:
    """The same, by how far an expert is from the mean, as a share of it."""
    return bias + rate * (_error(counts).double() / counts.sum().clamp(min=1)).to(bias.dtype)


def margins(scores: Float[Tensor, "N E"], bias: Float[Tensor, " E"], k: int) -> Float[Tensor, "E asked"]:
    """a_n - s_ni of each expert i and token n; of no token where every expert is chosen, whatever its bias."""
    experts = len(bias)
    return scores.new_zeros(experts, 0) if k == experts else _margins(scores, bias, k).t()


def quantile_bias(bias: Float[Tensor, " E"], asked: Float[Tensor, "E N"], k: int) -> Float[Tensor, " E"]:
    """The exact quantiles of these margins, centred: what histograms come near to."""
    experts, tokens = asked.shape
    if tokens == 0:
        return bias - bias.mean()
    below = max(1, round(tokens * k / experts))
    found = asked.kthvalue(below, dim=1).values.to(bias.dtype)
    return found - found.mean()


def histogram(scores: Float[Tensor, "N E"], bias: Float[Tensor, " E"], k: int, bins: int) -> Int[Tensor, "E bins"]:
    """How many tokens have a_n - s_ni in each bin of [least bias - 1, largest bias + 1], for each expert i."""
    experts = len(bias)
    counts = torch.zeros(experts, bins, dtype=torch.int64, device=bias.device)
    if k == experts:
        return counts
    low, width = _bins(bias, bins)
    place = ((_margins(scores, bias, k) - low) / width).long().clamp(0, bins - 1)
    return counts.scatter_add_(1, place.t(), torch.ones_like(place.t()))


def histogram_bias(bias: Float[Tensor, " E"], counts: Int[Tensor, "E bins"], k: int) -> Float[Tensor, " E"]:
    """The quantiles of a histogram, each between the edges of its bin by how many of its tokens are wanted, centred."""
    experts, bins = counts.shape
    tokens = counts.sum(dim=1, keepdim=True)
    if k == experts or not bool((tokens > 0).all()):
        return bias - bias.mean()
    low, width = _bins(bias, bins)
    wanted = tokens.double() * k / experts
    up_to = counts.cumsum(dim=1).double()
    at = (up_to < wanted).sum(dim=1, keepdim=True).clamp(max=bins - 1)
    inside = counts.gather(1, at).double()
    share = (wanted - (up_to.gather(1, at) - inside)) / inside.clamp(min=1)
    found = (low + width * (at + share)).squeeze(1).to(bias.dtype)
    return found - found.mean()


def _error(counts: Int[Tensor, " E"]) -> Int[Tensor, " E"]:
    # E * count against the total, in whole numbers: against a rounded mean an average expert would look off balance.
    return counts.sum() - counts * len(counts)


def _margins(scores: Float[Tensor, "N E"], bias: Float[Tensor, " E"], k: int) -> Float[Tensor, "N E"]:
    """a_n - s_ni: how large the bias of i must be for token n to choose it."""
    threshold = (scores + bias).topk(k + 1, dim=-1).values[:, k:]
    return threshold - scores


def _bins(bias: Float[Tensor, " E"], bins: int) -> tuple[Tensor, Tensor]:
    low, high = bias.aminmax()
    return low - 1, (high - low + 2) / bins
