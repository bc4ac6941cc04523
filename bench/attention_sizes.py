"""Sizes of the attention arms, apart from `bench.attention` so that a page may quote them without importing torch."""

HEADS, WIDTH = 4, 64
KEEP = 0.3  # the article's "sparsity", read as the share of tokens that is kept
KEPT = 1 - KEEP  # what is kept where it is read as the share that is dropped
KEYS = 512  # of a window, and of per-head top-k with a fixed number

ARMS = {
    "sdpa": "dense, torch's fused kernel",
    "dense": "dense, this project's kernel",
    "eager": "dense, the matrix of weights written out",
    "window": f"the last {KEYS} keys",
    "per_head_share": f"each head the {KEEP} of the visible keys that a linear map of x finds most important",
    "per_head_dropped": f"the same, {KEPT} of them: the article's figure read as what is dropped",
    "per_head_number": f"each head the {KEYS} visible keys that a linear map of x finds most important",
    "blocks_share": f"{KEEP} of the blocks of keys, by their mean key, this project's kernel",
}

BLOCK = 64  # tokens of a block, of queries as of keys
SEEN = 16  # blocks of keys that a block of queries sees
BRANCHING = 4

BLOCK_ARMS = {
    "sdpa": "dense, torch's fused kernel",
    "sdpa_fp32": "the same in fp32, which torch computes faster than bf16 on some processors",
    "dense": "dense, this project's kernel",
    "window": f"the last {SEEN} blocks: the same work without choosing, the ceiling of any choice",
    "blocks": f"the {SEEN} blocks whose mean key scores highest, of all",
    "hierarchical": f"{SEEN} blocks found down a tree of means, {BRANCHING} children a node, a beam",
    "best_first": f"the {SEEN} blocks of the largest bound, found down a tree of bounds",
    "plain": "what hierarchical chooses, computed in plain PyTorch",
    "flex": "what hierarchical chooses, computed by torch's FlexAttention, compiled; forward only",
}
