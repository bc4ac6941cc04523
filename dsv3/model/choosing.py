"""What choosing keys by content costs, by arithmetic on the config alone: FLOPs of the scores that decide. No torch.

    2 * scores * width    in each head that searches: as many scores as `dsv3.config.counts` says
    2 * H * nope * rank   in latent attention, for each query that chooses: it is compared in the latent's space

A node of a best-first search has two numbers a column, so its scores are twice as wide; counted is the beam that finds
its first threshold, since what it opens then depends on the data. Searches that run side by side are padded to rows of
one length: `SelectionCost.computed` has that, these do not. Making nodes adds up keys once and multiplies nothing.
"""

from typing import assert_never

from dsv3.config import Attention, Blocks, Grouped, Hierarchical, Latent, MultiHead
from dsv3.config.counts import scored, scored_in_all


def selection_flops(attention: Attention, length: int) -> int:
    """FLOPs of choosing in one layer over one sequence of `length` tokens; 0 for other choices."""
    choice = attention.select
    if not isinstance(choice, Blocks):
        return 0
    blocks = -(-length // choice.block_q)
    return _search(attention, choice, scored_in_all(choice, 0, length)) + _leaders(attention, blocks)


def decoding_flops(attention: Attention, visible: int) -> int:
    """FLOPs of choosing in one layer for one token after a cache that sees `visible` positions, its own included.

    The first token of a block of queries chooses for the others.
    """
    choice = attention.select
    if not isinstance(choice, Blocks):
        return 0
    block, place = divmod(visible - 1, choice.block_q)
    if place:
        return 0
    complete = block * choice.block_q // choice.block_k
    return _search(attention, choice, scored(choice, complete)) + _leaders(attention, 1)


def _search(attention: Attention, choice: Blocks, scores: tuple[int, ...]) -> int:
    match attention:
        case Latent():
            # all heads share one key there
            heads, groups = attention.num_attention_heads, 1
            width = attention.kv_lora_rank + (attention.qk_rope_head_dim if choice.rotated else 0)
        case MultiHead():
            heads, groups, width = attention.num_attention_heads, attention.num_attention_heads, attention.head_dim
        case Grouped():
            heads, groups, width = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
        case _:
            assert_never(attention)
    if isinstance(choice, Hierarchical) and choice.search == "best_first":
        width *= 2
    match choice.sharing:
        case "group":
            heads = groups
        case "all":
            heads, width = 1, groups * width
    return 2 * heads * width * sum(scores)


def _leaders(attention: Attention, queries: int) -> int:
    if not isinstance(attention, Latent):
        return 0
    return 2 * queries * attention.num_attention_heads * attention.qk_nope_head_dim * attention.kv_lora_rank
