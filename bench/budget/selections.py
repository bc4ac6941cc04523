"""How many numbers the lists of a selection of keys hold, in closed form: what attention keeps of them. No torch.

    Window         for each block of 64 queries the blocks of 64 keys that it may see, and their count, once for all
                   sequences and heads; a rank and a limit for each position
    PerHead        for each sequence, head and block of 256 queries its keys; the count of each block; for each
                   sequence, head and position a rank and a limit
    Blocks,        for each sequence, head that chooses and block of queries as many blocks of keys as the last one may
    Hierarchical   see, and a count; fewer are chosen under top_p, in as much room
    Auto           the same, in room for what the last before the crossover sees; nothing while none is behind it

    Indexer        for each sequence and position its keys, and one count for all sequences; nothing while no position
                   has more keys before it than it may see

All rows are as long as the longest. `dsv3.attention.select` makes the lists.
"""

from typing import assert_never

from dsv3.config import (
    Attention,
    Auto,
    Blocks,
    Everything,
    Grouped,
    Hierarchical,
    Indexer,
    Latent,
    MultiHead,
    PerHead,
    Select,
    Window,
)

WINDOW = 64  # queries and keys in a block of a window
PER_HEAD = 256  # queries that share a head's list, which goes key by key


def chooses(select: Select, length: int) -> bool:
    """Whether attention over `length` tokens goes by lists."""
    match select:
        case Everything():
            return False
        case Indexer():
            return length > select.index_topk
        case Auto():
            return length > select.crossover
        case _:
            return True


def listed(attention: Attention, sequences: int, length: int) -> tuple[int, bool]:
    """How many numbers one layer's lists hold, and whether each head has its own."""
    heads = attention.num_attention_heads
    if not chooses(attention.select, length):
        return 0, False
    match attention.select:
        case Everything():
            return 0, False
        case Window() as window:
            return _by_window(window, length) + 2 * length, False
        case PerHead() as per_head:
            blocks, keys = _by_head(per_head, length)
            return blocks + sequences * heads * (keys + 2 * length), True
        case Blocks() | Hierarchical() as choice:
            lists = {"head": heads, "group": _key_heads(attention), "all": 1}[choice.sharing]
            last = (length - 1) // choice.block_q
            most = choice.longest(last * choice.block_q // choice.block_k)
            return sequences * lists * (last + 1) * (most + 1), lists == heads
        case Indexer() as indexer:
            return sequences * length * indexer.index_topk + length, False
        case _:
            assert_never(attention.select)


def _by_window(window: Window, length: int) -> int:
    rows, longest = range(0, length, WINDOW), 0
    for first in rows:
        low = max(0, first - window.size + 1) // WINDOW
        high = (min(first + WINDOW, length) - 1) // WINDOW + 1
        longest = max(longest, high - low + min(low, -(-window.sink // WINDOW)))
    return len(rows) * (longest + 1)


def _by_head(select: PerHead, length: int) -> tuple[int, int]:
    """How many blocks of queries there are, and the keys that a head lists for them."""
    sizes = []
    for start in range(0, length, PER_HEAD):
        stop = min(start + PER_HEAD, length)
        most = min(select.k, stop) if select.k is not None else max(1, int((select.keep or 0.0) * stop))
        sizes.append(min(most, start) + stop - start)
    return len(sizes), len(sizes) * max(sizes)


def _key_heads(attention: Attention) -> int:
    """Heads of keys that an index compares queries with; MLA's heads share the latent."""
    match attention:
        case Latent():
            return 1
        case Grouped():
            return attention.num_key_value_heads
        case MultiHead():
            return attention.num_attention_heads
        case _:
            assert_never(attention)
