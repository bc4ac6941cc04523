"""Which experts the tokens of real text go to: a routing for timing layers of experts that stand alone.

    x_n = (e(t_n) + mean e(t_n-4 .. t_n-1)) / sqrt(5/4)     t the tokens of a row, e a random embedding
    s   = sigmoid(W x)                                      DeepSeek-V3's scores, W random
    b                                                       the bias that balances other text

A fresh model's router after a look at the few tokens before, balanced as a trained one is: over text in the mean, not
in each batch. A word that is frequent goes to the same experts wherever it stands, as it does in trained models
(OpenMoE, arXiv 2402.01739), so that loads are less even than those of as many independent tokens.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.config import MoE, presets
from dsv3.data.pack import Batches
from dsv3.data.prepare import Split, prepare
from dsv3.moe import Routing
from dsv3.moe.bias import margins, quantile_bias
from dsv3.moe.router import route, router_logits, score

WIDTH = 64  # of the embedding
BEFORE = 4  # tokens that a token looks at
LENGTH = 128  # tokens of a row: a batch is of many documents
BALANCED_ON = 8192  # tokens of other text
ROUNDS = 5  # of quantiles, each of which changes what the next one finds


class Router(NamedTuple):
    """What scores tokens: embedding [V, D], weight [E, D] and the bias [E] that balances them on validation text."""

    embedding: Tensor
    weight: Tensor
    bias: Tensor


def text_routing(tokens: int, moe: MoE, *, seed: int = 0) -> Routing:
    """The routing of so many tokens, in rows of `LENGTH` that the seed draws from the training text."""
    router = _router(moe, seed)
    return route(_hidden(_text()[0], tokens, router.embedding, seed), router.weight, router.bias, moe)


@lru_cache(maxsize=1)
def _router(moe: MoE, seed: int) -> Router:
    random = torch.Generator().manual_seed(seed)
    embedding = torch.randn(presets.article_small().model.vocab_size, WIDTH, generator=random)
    weight = torch.randn(moe.n_routed_experts, WIDTH, generator=random) / WIDTH**0.5
    bias = torch.zeros(moe.n_routed_experts)
    scores = score(router_logits(_hidden(_text()[1], BALANCED_ON, embedding, seed), weight), moe)
    k = moe.num_experts_per_tok
    for _ in range(ROUNDS):
        bias = quantile_bias(bias, margins(scores, bias, k), k)
    return Router(embedding, weight, bias)


def _text() -> tuple[Split, Split]:
    config = presets.article_small()
    found = prepare(config.data, config.model.vocab_size)
    return found.train, found.validation


def _hidden(split: Split, tokens: int, embedding: Tensor, seed: int) -> Float[Tensor, "N D"]:
    rows = Batches(split, -(-tokens // LENGTH), LENGTH + BEFORE - 1, seed).next()
    embedded = embedding[rows.long()]
    before = embedded.unfold(1, BEFORE, 1)[:, :LENGTH].mean(dim=-1)
    return ((embedded[:, BEFORE:] + before) / (1 + 1 / BEFORE) ** 0.5).flatten(0, 1)[:tokens]
