"""One layer of latent attention with and without V3.2's indexer, to time a prompt and the token that comes after it.

DeepSeek's proportions at a smaller size: the layer of `bench.decoding`, and half as many index heads as heads, as wide
as a head's key without position. 256 of the keys are seen: a prompt of 8K leaves out as much as one of 64K does there.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.decoding import HEADS, LATENT, WIDTH, hidden, made, one_layer, rounding
from dsv3.attention import KeyValueCache
from dsv3.config import Indexer, Latent, vary

TOPK = 256
INDEXER = Indexer(index_n_heads=HEADS // 2, index_head_dim=WIDTH, index_topk=TOPK, loss_weight=0.0)
ARMS: dict[str, Latent] = {
    "dense": LATENT,
    "indexer": vary(LATENT, select=INDEXER),
    "indexer_absorbed": vary(LATENT, select=INDEXER),
}


def call(arm: str, phase: str, length: int, *, seed: int = 0) -> Callable[[], Tensor]:
    """What computes a prompt of `length` tokens, or the last of them after a cache of the others."""
    model = one_layer(ARMS[arm], length)
    layer, x = made(model), hidden(length, 1, seed=seed)
    if phase == "prefill":
        return partial(_prefill, layer, x, absorbed=arm == "indexer_absorbed")
    cache = KeyValueCache.empty(model, 1, length)
    _fill(layer, x[:, :-1], cache)
    return partial(_decode, layer, x[:, -1:], cache.advance(length - 1))


def check(arm: str) -> None:
    """With keys to leave out, both forms and decoding agree; with none, attention is dense.

    Raises:
        AssertionError: with the largest difference, where they do not.
    """
    length = 300
    few = vary(ARMS[arm], **({} if arm == "dense" else {"select.index_topk": 64}))
    layer, x = made(one_layer(few, length)), hidden(length, 1)
    whole = _prefill(layer, x, absorbed=False)
    same = partial(torch.testing.assert_close, rtol=0.0, atol=rounding(whole))
    same(_prefill(layer, x, absorbed=True), whole)
    cache = KeyValueCache.empty(one_layer(few, length), 1, length)
    _fill(layer, x[:, :-1], cache)
    same(_decode(layer, x[:, -1:], cache.advance(length - 1)), whole[:, -1:])
    dense, all_seen = (made(one_layer(attention, length)) for attention in (ARMS["dense"], ARMS[arm]))
    all_seen.load_state_dict(dense.state_dict(), strict=False)
    same(_prefill(all_seen, x[:, :TOPK], absorbed=False), _prefill(dense, x[:, :TOPK], absorbed=False))


@torch.no_grad()
def _prefill(layer: nn.Module, x: Tensor, *, absorbed: bool) -> Tensor:
    out: Tensor = layer(x, absorbed=absorbed)[0]
    return out


@torch.no_grad()
def _decode(layer: nn.Module, token: Tensor, cache: KeyValueCache) -> Tensor:
    """The cache stays as long as it is, so calls repeat."""
    out: Tensor = layer(token, cache=cache.layers[0])[0]
    return out


@torch.no_grad()
def _fill(layer: nn.Module, x: Tensor, cache: KeyValueCache) -> None:
    for part in x.split(1024, dim=1):
        layer(part, cache=cache.layers[0])
        cache = cache.advance(part.shape[1])
