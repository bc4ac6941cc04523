"""Selection: which keys a query sees, as a value that every selector returns and `attend` consumes.

Queries and keys are cut into blocks of `block_q` and `block_k` tokens. For each block of queries a selection lists
blocks of keys; a token-exact rule may refine the list. The query at position t sees the key at position j iff

    j's block is listed for t's block   and   j <= t   and   rank[j] <= limit[t]   (where rank and limit are given)

Ranks say "the keys in order of preference": a window prefers the latest, per-head top-k the most important. Since a
comparison with a limit is all that is asked of them, ranks may be counted over the whole sequence without letting later
tokens decide what an earlier query sees.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SelectionCost:
    """What selecting cost and left over, counted in closed form by the selector, over batch and the selection's heads.

    scored: scores computed to select. kept: (query, key) pairs that remain to attend to; dense causal attention keeps
    T(T+1)/2 per head. per_level: the scores by level of a tree, from the leaves, where a selector has levels.
    """

    scored: int
    kept: int
    per_level: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The keys seen by the last T of S positions; h is 1 (shared by all heads), G (per key-value head) or H (per query
    head).

    indices  blocks of keys per block of queries, ascending, without repeats; counts says how many of the K are valid.
    rank, limit  the token-exact rule, both or neither.
    weights  added to the logits of a key: the importance that selected it, so that selecting has a gradient.
    """

    indices: Int[Tensor, "B h Nq K"]
    counts: Int[Tensor, "B h Nq"]
    block_q: int
    block_k: int
    cost: SelectionCost
    rank: Int[Tensor, "B h S"] | None = None
    limit: Int[Tensor, "B h T"] | None = None
    weights: Float[Tensor, "B h S"] | None = None

    def __post_init__(self) -> None:
        assert (self.rank is None) == (self.limit is None), "rank and limit are one rule: give both or neither"
        assert min(self.block_q, self.block_k) > 0, "a block holds at least one token"
