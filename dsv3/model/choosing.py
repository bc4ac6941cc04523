"""What choosing keys by content costs, by arithmetic on the config alone: FLOPs of the scores that decide. No torch.

    2 * scores * width    in each head that searches: as many scores as `dsv3.config.counts` says
    2 * H * nope * rank   in latent attention, for each query that chooses: it is compared in the latent's space
    2 * scores * width    once more for the blocks that are seen, where their scores have a gradient
    4 * pairs * H * width a branch: of each query and each block that ends at or before it, against two means

A node of a best-first search has two numbers a column, so its scores are twice as wide; counted is the beam that finds
its first threshold, since what it opens then depends on the data. Searches in tensors run side by side, padded to rows
of one length: `SelectionCost.computed` has that, these do not. Making nodes adds up keys once and multiplies nothing.
"""

from typing import assert_never

from dsv3.config import Attention, Blocks, Grouped, Hierarchical, Latent, MultiHead
from dsv3.config.counts import branch_pairs, learnt_in_all, past_pairs, scored, scored_in_all


def selection_flops(attention: Attention, length: int) -> int:
    """FLOPs of choosing in one layer over one sequence of `length` tokens; 0 for other choices."""
    choice = attention.select
    if not isinstance(choice, Blocks):
        return 0
    blocks = -(-length // choice.block_q)
    return _search(attention, choice, scored_in_all(choice, 0, length)) + _leaders(attention, blocks)


def learning_flops(attention: Attention, length: int) -> dict[str, int]:
    """FLOPs of what has a gradient in one layer, forward over one sequence: "learning.scores" of a choice that is gated
    or goes by entmax, "branch.scores" of the attention of a branch.
    """
    choice = attention.select
    if not isinstance(choice, Blocks) or isinstance(attention, Latent):
        return {}
    match choice.learns:
        case "gated" | "entmax":
            return {"learning.scores": 2 * _width(attention, choice) * learnt_in_all(choice, length)}
        case "branch":
            width = attention.num_attention_heads * attention.head_dim
            return {"branch.scores": 4 * width * branch_pairs(choice, 0, length)}
        case _:
            return {}


def teaching_flops(attention: Attention, length: int) -> tuple[int, int]:
    """FLOPs of the loss of a choice that is distilled, in one layer, forward over one sequence: the logits of attention
    once more, and the scores that learn from them.
    """
    choice = attention.select
    if not isinstance(choice, Blocks) or choice.learns != "distilled" or isinstance(attention, Latent):
        return 0, 0
    teacher = attention.num_attention_heads * attention.head_dim * past_pairs(choice, length)
    return 2 * teacher, 2 * _width(attention, choice) * learnt_in_all(choice, length)


def decoding_flops(attention: Attention, visible: int) -> int:
    """FLOPs of choosing in one layer for one token after a cache that sees `visible` positions, its own included, and
    of what a choice that learns adds.

    The first token of a block of queries chooses for the others; scores that attention reads are taken for each token.
    """
    choice = attention.select
    if not isinstance(choice, Blocks):
        return 0
    block, place = divmod(visible - 1, choice.block_q)
    complete, learnt = block * choice.block_q // choice.block_k, 0
    if choice.learns in ("gated", "entmax"):
        learnt = 2 * _width(attention, choice) * choice.past(complete)
    elif choice.learns == "branch" and not isinstance(attention, Latent):
        learnt = 4 * attention.num_attention_heads * attention.head_dim * branch_pairs(choice, visible - 1, visible)
    if place:
        return learnt
    return learnt + _search(attention, choice, scored(choice, complete)) + _leaders(attention, 1)


def _search(attention: Attention, choice: Blocks, scores: tuple[int, ...]) -> int:
    bounds = isinstance(choice, Hierarchical) and choice.search == "best_first"
    return 2 * _width(attention, choice) * (2 if bounds else 1) * sum(scores)


def _width(attention: Attention, choice: Blocks) -> int:
    """Numbers of a query that one score of each head takes, over the heads that choose."""
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
    match choice.sharing:
        case "group":
            heads = groups
        case "all":
            heads, width = 1, groups * width
    return heads * width


def _leaders(attention: Attention, queries: int) -> int:
    if not isinstance(attention, Latent):
        return 0
    return 2 * queries * attention.num_attention_heads * attention.qk_nope_head_dim * attention.kv_lora_rank
