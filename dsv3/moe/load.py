"""How evenly experts are loaded, and how even they could be by chance.

With c_i tokens at expert i, c = mean of the c_i, q_i = c_i / sum c:

    MaxVio               max c_i / c - 1                       (arXiv 2408.15664 equation 4)
    CV                   standard deviation of c_i / c
    Gini                 mean over pairs |c_i - c_j| / (2 c)
    effective experts    exp(- sum q_i log q_i)
    dead                 experts without a token

None of these is zero for a router that plays no favourites: N tokens that pick K distinct experts at random spread like
a multinomial, and with 8 tokens per expert the busiest of 128 has about twice the mean. So statistics stand beside the
floor that uniform random routing of the same E, K and N gives, and batches of text beside one of their own:

    excess MaxVio        MaxVio / floor                        floor by Monte Carlo, seeded
    excess squared CV    CV^2 - (E - K) / (N K)                its expectation, in closed form
    drop floor           the share that a capacity drops       floor by Monte Carlo, seeded
    block floor          MaxVio of a router even over all      real blocks shuffled into batches, seeded
                         text, as its tokens hang together

Routing that looks at the whole batch can lie below the floor. Routing token by token, with a bias fixed before the
batch, does not in the mean of squared CV. MaxVio can lie below even so, where a token's experts go together, as under a
limit of groups: the maximum is then over fewer experts that differ.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3.config.rules import require

DRAWS = 200


@dataclass(frozen=True)
class LoadStatistics:
    """How even one count of tokens per expert is; `dropped` is the share of token-expert pairs that capacity drops."""

    max_vio: float
    max_vio_floor: float
    cv: float
    excess_cv_squared: float
    gini: float
    dead: int
    effective_experts: float
    dropped: float

    @property
    def excess_max_vio(self) -> float:
        """MaxVio as a multiple of what uniform random routing gives: 1 is as even as chance."""
        if self.max_vio_floor == 0.0:
            return 1.0 if self.max_vio == 0.0 else math.inf
        return self.max_vio / self.max_vio_floor


def max_vio(counts: Int[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """MaxVio of each row of counts, in float64 and on their device; NaN for a row without tokens."""
    loads = counts.double()
    return loads.amax(dim=-1) / loads.mean(dim=-1) - 1


def load_statistics(counts: Int[Tensor, " E"], k: int, kept: Bool[Tensor, "N K"] | None = None) -> LoadStatistics:
    """The statistics of `counts`, the tokens per expert before dropping, of tokens that each go to `k` experts.

    Counts may be sums over batches or processes: the floor is that of as many tokens as were counted.

    Raises:
        ValueError: when the counts are no sum over tokens that each go to `k` experts.
    """
    c = counts.detach().cpu().numpy().astype(np.float64)
    total, experts = int(c.sum()), len(c)
    if total == 0 or total % k:
        raise ValueError(f"counts={counts.tolist()}: must add up to tokens x k, with k={k}; count before dropping")
    mean, share = c.mean(), c[c > 0] / total
    cv = c.std() / mean
    rank = np.arange(1, experts + 1)
    return LoadStatistics(
        max_vio=float(max_vio(counts)),
        max_vio_floor=max_vio_floor(experts, k, total // k),
        cv=float(cv),
        excess_cv_squared=float(cv**2 - (experts - k) / total),
        gini=float(((2 * rank - experts - 1) * np.sort(c)).sum() / (experts * total)),
        dead=int((c == 0).sum()),
        effective_experts=float(np.exp(-(share * np.log(share)).sum())),
        dropped=dropped_share(kept),
    )


def dropped_share(kept: Bool[Tensor, "N K"] | None) -> float:
    """The share of token-expert pairs that no expert takes; 0 where there is no pair to drop."""
    return 0.0 if kept is None or kept.numel() == 0 else 1.0 - float(kept.double().mean())


def max_vio_floor(experts: int, k: int, tokens: int) -> float:
    """The mean MaxVio of uniform random routing.

    Raises:
        ValueError: no tokens, whose mean load of zero nothing violates.
    """
    _require_tokens(tokens)
    counts = uniform_counts(experts, k, tokens)
    return float(max_vio(torch.tensor(counts)).numpy().mean())


def drop_floor(experts: int, k: int, tokens: int, capacity: int) -> float:
    """The mean share of pairs that experts of this capacity drop under uniform random routing.

    Raises:
        ValueError: no tokens, which make no pairs.
    """
    _require_tokens(tokens)
    over = np.maximum(uniform_counts(experts, k, tokens) - capacity, 0)
    return float(over.sum(axis=1).mean() / (tokens * k))


def block_floor(counts: Int[Tensor, "S E"], blocks: int, draws: int = DRAWS, seed: int = 0) -> float:
    """The mean MaxVio of batches of so many of S real blocks of tokens, were each expert's load over all of them equal.

    Tokens of a text want the same experts, so that batches of whole blocks differ more than batches of independent
    tokens. An expert that no block chose counts as one at the mean. A floor for routers that are nearly even: each
    expert's loads are scaled to the mean, so that one with few tokens, in few blocks, comes out as very uneven.

    Raises:
        ValueError: fewer blocks than are to be drawn, or a block without tokens.
    """
    c = counts.detach().cpu().numpy().astype(np.float64)
    rule = f"must be at most the S={len(c)} blocks that there are"
    require(0 < blocks <= len(c), "blocks", blocks, rule, "count the loads of more text, or ask for smaller batches")
    empty = np.flatnonzero(c.sum(axis=1) == 0).tolist()
    require(not empty, "empty blocks", empty, "every block must have tokens", "leave these out of the counts")
    random = np.random.default_rng((seed, *c.shape, blocks))
    mean = c.mean(axis=0)
    even = np.divide(c, mean, out=np.ones_like(c), where=mean > 0)
    batches = (even[random.choice(len(c), blocks, replace=False)].mean(axis=0) for _ in range(draws))
    # Not `max_vio`: means of shares, not of counts, which torch would round otherwise than what is recorded was.
    return float(np.mean([batch.max() / batch.mean() - 1 for batch in batches]))


def rank_max_vio(counts: Int[Tensor, " E"], ranks: int) -> float:
    """MaxVio of the ranks among which the experts are divided in order, equally many to each.

    Raises:
        ValueError: ranks that do not divide the experts, or counts of no token.
    """
    divides = ranks > 0 and len(counts) % ranks == 0
    require(divides, "ranks", ranks, f"must divide the {len(counts)} experts", "choose a divisor")
    loads = counts.view(ranks, -1).sum(dim=1)
    rule = "must be of at least one token"
    require(bool(loads.any()), "counts", counts.tolist(), rule, "leave out batches without tokens")
    return float(max_vio(loads))


@lru_cache(maxsize=32)
def uniform_counts(experts: int, k: int, tokens: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Tokens per expert in `draws` batches in which every token picks `k` distinct experts at random."""
    random = np.random.default_rng((seed, experts, k, tokens))
    counts = np.empty((draws, experts), dtype=np.int64)
    for draw in counts:
        draw[:] = np.bincount(distinct_experts(random, experts, k, tokens).ravel(), minlength=experts)
    counts.flags.writeable = False
    return counts


def distinct_experts(random: np.random.Generator, experts: int, k: int, tokens: int) -> np.ndarray:
    """For each token `k` distinct experts, every set of them as likely as any other."""
    if k * k > experts:
        return random.random((tokens, experts)).argpartition(k - 1, axis=1)[:, :k]
    chosen = random.integers(experts, size=(tokens, k))
    # Redrawing a token's whole choice until its experts differ leaves every set equally likely.
    while len(again := _with_repeats(chosen)):
        chosen[again] = random.integers(experts, size=(len(again), k))
    return chosen


def _require_tokens(tokens: int) -> None:
    rule = "must be at least 1: without tokens there is no floor"
    require(tokens > 0, "tokens", tokens, rule, "leave out batches without tokens")


def _with_repeats(chosen: np.ndarray) -> np.ndarray:
    ordered = np.sort(chosen, axis=1)
    return np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
