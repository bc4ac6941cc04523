"""Arms of decoding against a long cache, attention alone: SDPA reads all of it, a choice reads its blocks.

A round is a block of 64 tokens, each at its own place at the end of a cache. Selectors that let a block of queries
choose once search at the first of them alone, and a node of the tree is completed by the last, so a round holds the
dear tokens at their true share. Choosing is inside: the new key joins the tree, the query walks down it, `attend` reads
what was found. So that a ratio to SDPA can be split, `dense` reads all of the cache in this project's kernel: what the
code gains.

Each token takes the next of several caches, together larger than any processor's cache, so that every call reads from
memory, as a layer of a model does that comes round once per token. The places are dealt out: with n caches each goes
through a run of 64 / n of them in every round, back from its last to its first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.attention_sizes import BLOCK, BRANCHING, HEADS, SEEN, WIDTH
from dsv3.attention import Selection, attend, reference
from dsv3.attention.select import Index, blocks, hierarchical, leading, remember, select, unfinished
from dsv3.config import Blocks, Hierarchical

CHOICES: dict[str, Blocks] = {
    "blocks": Blocks(k=SEEN, block_q=BLOCK, block_k=BLOCK),
    "hierarchical": Hierarchical(k=SEEN, block_q=BLOCK, block_k=BLOCK, branching=BRANCHING),
    "blocks_per_token": Blocks(k=SEEN, block_q=1, block_k=BLOCK),
    "hierarchical_per_token": Hierarchical(k=SEEN, block_q=1, block_k=BLOCK, branching=BRANCHING),
}
KERNEL = "dense"  # the arm that plain PyTorch has no form of
ARMS = ("sdpa", KERNEL, *CHOICES)
LENGTH = 65536  # positions after the last token of a round
ROUND = BLOCK  # tokens
COLD = 2**26  # bytes read between two visits of a cache, beyond what a processor keeps


@dataclass(frozen=True)
class Cache:
    """Keys and values of all positions, and what choices remember of those before the round."""

    k: Tensor
    v: Tensor
    indexes: dict[str, Index]


@dataclass(frozen=True)
class Decoder:
    """The queries of a round, the last positions of as many caches as make every token's reads cold."""

    q: Tensor
    caches: tuple[Cache, ...]

    @property
    def before(self) -> int:
        """Positions before the round."""
        return self.caches[0].k.shape[2] - ROUND

    def turns(self) -> list[tuple[int, Cache]]:
        """The place of each token of a round, and its cache: caches in turn, each from place to place."""
        run = ROUND // len(self.caches)
        return [(i * run + step, cache) for step in range(run) for i, cache in enumerate(self.caches)]


def decoder(length: int, batch: int, *, seed: int = 0) -> Decoder:
    """Random keys, values and queries in fp32; `batch` is a power of two."""
    generator = torch.Generator().manual_seed(seed)
    touched = 2 * batch * HEADS * SEEN * BLOCK * WIDTH * 4
    q = torch.randn(batch, HEADS, ROUND, WIDTH, generator=generator)
    return Decoder(q, tuple(_cache(length, q, generator) for _ in range(max(2, COLD // touched))))


def _cache(length: int, q: Tensor, generator: torch.Generator) -> Cache:
    k, v = (torch.randn(len(q), HEADS, length, WIDTH, generator=generator) for _ in range(2))
    before = length - ROUND
    cache = Cache(k, v, {arm: _index(choice, k[:, :, :before], length) for arm, choice in CHOICES.items()})
    for arm in CHOICES:
        chosen(arm, q[:, :, :1], cache, before)  # a cache that comes in at a later place has seen its block's first
    return cache


def _index(choice: Blocks, k: Tensor, length: int) -> Index:
    size = (k.shape[0], k.shape[1], k.shape[1], k.shape[3])
    index = Index.empty(choice, size, length)
    index.extend(choice, k[:, :, leading(choice, 0)], k, 0, k.shape[2])
    return index


def decode(arm: str, given: Decoder) -> list[Tensor]:
    """The attention of a round of tokens, in the order of `turns`."""
    with torch.no_grad():
        return [_token(arm, given, place, cache) for place, cache in given.turns()]


def _token(arm: str, given: Decoder, place: int, cache: Cache) -> Tensor:
    q, position = given.q[:, :, place : place + 1], given.before + place
    k, v = cache.k[:, :, : position + 1], cache.v[:, :, : position + 1]
    if arm in CHOICES:
        return attend(q, k, v, chosen(arm, q, cache, position))
    return attend(q, k, v, implementation="kernel" if arm == KERNEL else "plain")


def chosen(arm: str, q: Tensor, cache: Cache, position: int) -> Selection | None:
    """What the token at a position sees, its own key having joined the summaries."""
    choice, total = CHOICES[arm], position + 1
    new = cache.k[:, :, unfinished(choice, position) : total]
    index = remember(choice, q[:, :, leading(choice, position)], new, position, total, cache.indexes[arm])
    return select(choice, (q.shape[0], 1), total, None, q.device, index=index)


def check(arm: str) -> None:
    """Tokens after a short cache see what the whole forward pass lets them see, and attend as the reference does.

    Raises:
        AssertionError: with the largest difference, where one does not.
    """
    length = 2 * SEEN * BLOCK + BLOCK
    given = decoder(length, 2)
    found = list(zip(given.turns(), decode(arm, given), decode(arm, given), strict=True))
    for (place, cache), first, again in found[:: ROUND // 4 + 1]:
        total = given.before + place + 1
        k, v = cache.k[:, :, :total], cache.v[:, :, :total]
        whole = torch.cat((torch.zeros_like(k[:, :, : given.before]), given.q[:, :, : place + 1]), dim=2)
        seen = _seen(arm, whole, k)
        right = reference.attention(given.q[:, :, place : place + 1], k, v, seen, scale=WIDTH**-0.5)
        # sums of about a thousand products in fp32, in orders of their own
        bound = 64 * torch.finfo(torch.float32).eps * max(1.0, right.abs().max().item())
        for ours in (first, again):
            torch.testing.assert_close(ours.double(), right, rtol=0.0, atol=bound)


def _seen(arm: str, q: Tensor, k: Tensor) -> reference.Seen:
    choice, total = CHOICES.get(arm), k.shape[2]
    if choice is None:
        return reference.everything
    selection = hierarchical(q, k, choice) if isinstance(choice, Hierarchical) else blocks(q, k, choice)
    return reference.selected(selection, heads=HEADS, queries=total, total=total)
