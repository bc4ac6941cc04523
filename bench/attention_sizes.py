"""Sizes of the attention arms, apart from `bench.attention` so that a page may quote them without importing torch."""

HEADS, WIDTH = 4, 64
KEEP = 0.3  # the article's share of tokens
KEYS = 512  # of a window, and of per-head top-k with a fixed number

ARMS = {
    "sdpa": "dense, torch's fused kernel",
    "eager": "dense, the matrix of weights written out",
    "window": f"the last {KEYS} keys",
    "per_head_share": f"each head the {KEEP} of the visible keys that a linear map of x finds most important",
    "per_head_number": f"each head the {KEYS} visible keys that a linear map of x finds most important",
}
