"""Arms of decoding a token against a long cache, attention alone: SDPA reads all of it, a choice reads its blocks.

Each call takes the next of several caches, together larger than any processor's cache, so that every call reads from
memory, as a layer of a model does that comes round once per token. Choosing is inside: the new key joins the tree, the
query walks down it, `attend` reads what was found.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from bench.attention_sizes import BLOCK, BRANCHING, HEADS, SEEN, WIDTH
from dsv3.attention import Selection, attend, reference
from dsv3.attention.select import Index, blocks, hierarchical, leading, remember, select, unfinished
from dsv3.config import Blocks, Hierarchical

CHOICES: dict[str, Blocks] = {
    "blocks": Blocks(k=SEEN, block_q=1, block_k=BLOCK),
    "hierarchical": Hierarchical(k=SEEN, block_q=1, block_k=BLOCK, branching=BRANCHING),
}
LENGTH = 65536
COLD = 2**26  # bytes that the calls of a round touch, beyond the caches of a core


@dataclass(frozen=True)
class Cache:
    """Keys and values of all positions but for the summaries of the last: what a decoder holds before the token."""

    k: Tensor
    v: Tensor
    indexes: dict[str, Index]


@dataclass(frozen=True)
class Step:
    """The query of the last of `length` positions, and caches to take in turn."""

    q: Tensor
    caches: tuple[Cache, ...]
    turn: Iterator[Cache] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turn", cycle(self.caches))


def step(length: int, batch: int, *, seed: int = 0) -> Step:
    """Random keys, values and a query in fp32; as many caches as make the reads of a round cold."""
    generator = torch.Generator().manual_seed(seed)
    touched = 2 * batch * HEADS * SEEN * BLOCK * WIDTH * 4
    caches = tuple(_cache(length, batch, generator) for _ in range(max(2, -(-COLD // touched))))
    return Step(torch.randn(batch, HEADS, 1, WIDTH, generator=generator), caches)


def _cache(length: int, batch: int, generator: torch.Generator) -> Cache:
    k, v = (torch.randn(batch, HEADS, length, WIDTH, generator=generator) for _ in range(2))
    before = length - 1
    return Cache(k, v, {name: _index(choice, k[:, :, :before], length) for name, choice in CHOICES.items()})


def _index(choice: Blocks, k: Tensor, length: int) -> Index:
    size = (k.shape[0], k.shape[1], k.shape[1], k.shape[3])
    return Index.empty(choice, size, length).extend(choice, k[:, :, leading(choice, 0)], k, 0, k.shape[2])


def decode(arm: str, given: Step) -> Tensor:
    """The attention of the new token, in the next cache."""
    cache = next(given.turn)
    with torch.no_grad():
        if arm == "sdpa":
            return attend(given.q, cache.k, cache.v)
        return attend(given.q, cache.k, cache.v, chosen(arm, given.q, cache))


def chosen(arm: str, q: Tensor, cache: Cache) -> Selection | None:
    """What the new token sees, its own key having joined the summaries."""
    choice, total = CHOICES[arm], cache.k.shape[2]
    new = cache.k[:, :, unfinished(choice, total - 1) :]
    index = remember(choice, q, new, total - 1, total, cache.indexes[arm])
    return select(choice, (q.shape[0], 1), total, None, q.device, index=index)


def check(arm: str) -> None:
    """A token after a short cache sees what the whole forward pass lets it see, and attends as the reference does.

    Raises:
        AssertionError: with the largest difference, where it does not.
    """
    length = 2 * SEEN * BLOCK + 5
    given = step(length, 2)
    cache = given.caches[0]
    whole = torch.cat((torch.zeros_like(cache.k[:, :, 1:]), given.q), dim=2)  # only the last query is asked about
    choice = CHOICES[arm]
    found = (hierarchical if isinstance(choice, Hierarchical) else blocks)(whole, cache.k, choice)  # type: ignore[arg-type]
    seen = reference.selected(found, heads=HEADS, queries=length, total=length)
    right = reference.attention(given.q, cache.k, cache.v, seen, scale=WIDTH**-0.5)
    # sums of about a thousand products in fp32, in orders of their own
    bound = 64 * torch.finfo(torch.float32).eps * max(1.0, right.abs().max().item())
    torch.testing.assert_close(decode(arm, given).double(), right, rtol=0.0, atol=bound)
