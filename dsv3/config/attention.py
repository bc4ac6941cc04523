"""Attention is two choices: how keys and values are made, and which of them a query sees.

    MultiHead | Grouped | Latent        one K and V per head | shared by a group of heads | compressed to a latent (MLA)
      each with  select =  Everything | Window | PerHead | Blocks | Hierarchical | Auto
      Latent also with     Indexer (DeepSeek-V3.2's sparse attention)

Sources: Vaswani et al. 2017 (MultiHead), arXiv 2305.13245 (Grouped), DeepSeek-V2 and V3, arXiv 2405.04434 and
2412.19437 section 2.1.1 (Latent). `PerHead` is the article's dynamic sparse attention in the form that can run;
`dsv3/attention/select/per_head.py` says what was repaired. `Blocks` and `Hierarchical` choose by what queries and keys
say to each other; so that a query block's choice leaks nothing, it is made with the query of its first token. `Auto` is
dense where that is faster. `Indexer` chooses with small queries and keys of its own (DeepSeek-V3.2, arXiv 2512.02556
section 2). A choice has no gradient; `Blocks.learns` has the ways in which one learns all the same, and
`dsv3/attention/select/learning.py` says what each of them costs.
"""

from dataclasses import dataclass, field
from typing import Literal

from dsv3.config.rules import require, require_kind, require_number, require_one_of, require_positive


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Every key up to the query's own position: dense causal attention."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The last `size` keys (the query's own included) and the first `sink` keys of the sequence."""

    size: int
    sink: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "size")
        require_number(self, "sink", low=0)


@dataclass(frozen=True, kw_only=True)
class PerHead:
    """Each head keeps the visible tokens that a linear map of x scores highest.

    Either a share of the visible tokens (`keep`, the article's 0.3; the cost then stays quadratic) or a fixed number
    of them (`k`).
    """

    keep: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        given = (self.keep is not None) + (self.k is not None)
        require(
            given == 1,
            "(keep, k)",
            (self.keep, self.k),
            "exactly one of the two is set",
            "PerHead(keep=0.3) or PerHead(k=1024)",
        )
        if self.keep is not None:
            require_number(self, "keep", low=0.0, high=1.0, above=True)
        else:
            require_positive(self, "k")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Each block of queries sees the key blocks whose mean key its first query scores highest (MoBA, arXiv 2502.13189).

    Always seen are the block's own, the previous and the first block; the others are chosen among those that end before
    the first query.

    Attributes:
        k: blocks seen, the forced ones among them; or
        keep: a share of the blocks up to the query's own, forced ones among them; the cost then stays quadratic.
        top_p: of the blocks chosen so, only the fewest that hold this much of their softmax mass; None: all of them.
        block_q, block_k: tokens in a block of queries and of keys; one divides the other. 1 query: a choice per token.
        sharing: whether each query head chooses, each group of heads that share keys, or all heads together, by the
            mean of their scores.
        rotated: whether queries and keys are compared after the rotary embedding, or before it.
        learns: how keys learn to be found, with multi-head and grouped attention.
            "nothing": only by being attended to (MoBA).
            "branch": the means of keys and values are attended to as well, in a branch with a gate (NSA, arXiv
            2502.11089).
            "distilled": the scores of seen blocks learn to follow attention's own mass on them, by a loss.
            "gated": a seen block's weight in the softmax is multiplied by 2 sigmoid(score).
            "entmax": by the 1.5-entmax of the scores (arXiv 1905.05702), which also leaves out blocks that it gives 0.
        loss_weight: of the loss of "distilled".
    """

    k: int | None = None
    keep: float | None = None
    top_p: float | None = None
    block_q: int = 64
    block_k: int = 64
    sharing: Literal["head", "group", "all"] = "head"
    rotated: bool = True
    learns: Literal["nothing", "branch", "distilled", "gated", "entmax"] = "nothing"
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "block_q", "block_k")
        longer, shorter = max(self.block_q, self.block_k), min(self.block_q, self.block_k)
        sizes = (self.block_q, self.block_k)
        require(longer % shorter == 0, "(block_q, block_k)", sizes, "one must divide the other", "use powers of two")
        given = (self.k is not None) + (self.keep is not None)
        example = f"{type(self).__name__}(k=16) or {type(self).__name__}(keep=0.3)"
        require(given == 1, "(k, keep)", (self.k, self.keep), "exactly one of the two is set", example)
        if self.k is None:
            require_number(self, "keep", low=0.0, high=1.0, above=True)
        else:
            require_positive(self, "k")
            rule = f"must be at least {self.own + 2}: the own, the previous and the first block are always seen"
            require(self.k >= self.own + 2, "k", self.k, rule, "see more blocks, or use Window")
        if self.top_p is not None:
            require_number(self, "top_p", low=0.0, high=1.0, above=True)
        require_one_of(self, "sharing", ("head", "group", "all"))
        require_kind(self, "rotated", (bool,))
        require_one_of(self, "learns", ("nothing", "branch", "distilled", "gated", "entmax"))
        require_number(self, "loss_weight", low=0.0)
        idle = self.learns == "distilled" and self.loss_weight == 0
        require(not idle, "loss_weight", 0, "must be above 0: nothing else is distilled", "use 1, or learns='nothing'")

    @property
    def scores(self) -> bool:
        """Whether the scores of seen blocks have a gradient."""
        return self.learns in ("distilled", "gated", "entmax")

    @property
    def own(self) -> int:
        """How many key blocks a block of queries lies in."""
        return max(1, self.block_q // self.block_k)

    def past(self, complete: int) -> int:
        """How many of `complete` key blocks before a query are seen, at most, the first and the previous among them."""
        if self.k is not None:
            return min(complete, self.k - self.own)
        assert self.keep is not None, "a number or a share of the blocks is kept"
        return min(complete, max(2, int(self.keep * (complete + self.own)) - self.own))

    def longest(self, complete: int) -> int:
        """Key blocks in the longest list, at most, of the blocks of queries up to that behind `complete` of them."""
        return self.past(complete) + self.own


@dataclass(frozen=True, kw_only=True)
class Hierarchical(Blocks):
    """`Blocks`, found by walking down a tree over the key blocks, so that choosing costs O(n log n) for a fixed k.

    Attributes:
        branching: children of a node.
        search: "beam" compares means and keeps the best `width` nodes of each level: nearly what Blocks finds.
            "best_first" compares the upper bounds that a node's smallest and largest keys give q.k (Quest, arXiv
            2406.10774) and finds exactly the key blocks of the largest bound; in the worst case it looks at all.
        width: nodes kept per level, not fewer than blocks are; None: as many as past blocks are seen.
    """

    branching: int = 4
    search: Literal["beam", "best_first"] = "beam"
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "branching")
        require(self.branching >= 2, "branching", self.branching, "must be at least 2", "use 4")
        require_one_of(self, "search", ("beam", "best_first"))
        rule = f"must be 'beam' where learns={self.learns!r}: keys learn to be found by their mean, not by a bound"
        fits = self.search == "beam" or not self.scores
        require(fits, "search", self.search, rule, "search by means, or use learns='nothing' or 'branch'")
        if self.width is not None:
            require_positive(self, "width")

    def beam(self, complete: int) -> int:
        """How many nodes of each level are kept in the search for a query behind `complete` key blocks."""
        return max(self.past(complete), self.width or 1)


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """Each token sees the keys that a lightning indexer scores highest, the same ones in all heads (DeepSeek-V3.2).

    The indexer reads the query latent, so it comes with `Latent` attention that has one.

    Attributes:
        index_n_heads, index_head_dim: the indexer's heads and their width, of which `qk_rope_head_dim` are rotated.
        index_topk: keys seen; a token with fewer before it sees them all.
        stage: of training. "warmup": attention is dense, and the indexer alone learns to follow it. "sparse": attention
            sees what the indexer selects, and both learn.
        loss_weight: of the indexer's loss; 0: it does not learn.
    """

    index_n_heads: int
    index_head_dim: int
    index_topk: int
    stage: Literal["warmup", "sparse"] = "sparse"
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "index_n_heads", "index_head_dim", "index_topk")
        require_one_of(self, "stage", ("warmup", "sparse"))
        require_number(self, "loss_weight", low=0.0)
        idle = self.stage == "warmup" and self.loss_weight == 0
        require(
            not idle, "loss_weight", self.loss_weight, "must be above 0 in the warmup: nothing else learns", "use 1"
        )


@dataclass(frozen=True, kw_only=True)
class Auto(Hierarchical):
    """Everything before a crossover, `Hierarchical` from there on, as the query's own position has it.

    So what a token sees never depends on what comes after it, and what the first tokens of a long sequence cost is
    bounded by the crossover. `dsv3.attention.select.auto` gives a tree the crossover that was measured.

    Attributes:
        crossover: tokens that see every key up to their own; whole blocks of queries and of keys.
    """

    crossover: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "crossover", low=0)
        size = max(self.block_q, self.block_k)
        rule = f"must be a multiple of {size}, the larger block: a block of queries chooses as one"
        require(self.crossover % size == 0, "crossover", self.crossover, rule, "round it up")
        rule = "must be None: it would leave out keys before the crossover too"
        require(self.top_p is None, "top_p", self.top_p, rule, "use Hierarchical")
        rule = "must be 'nothing': before the crossover there is no choice to learn from"
        require(self.learns == "nothing", "learns", self.learns, rule, "use Hierarchical")

    def past(self, complete: int) -> int:
        """As of the tree, but all of them before the crossover."""
        return complete if complete * self.block_k < self.crossover else super().past(complete)

    def longest(self, complete: int) -> int:
        """As of the tree, or all that the last block of queries before the crossover sees."""
        before = self.crossover // self.block_k
        return max(super().longest(complete), min(complete + self.own, before))


Select = Everything | Window | PerHead | Blocks | Hierarchical | Auto | Indexer
SELECTS = (Everything, Window, PerHead, Blocks, Hierarchical, Auto)  # that any attention can have


@dataclass(frozen=True, kw_only=True)
class MultiHead:
    """One key and one value per query head."""

    num_attention_heads: int
    head_dim: int
    select: Select = field(default_factory=Everything)

    def __post_init__(self) -> None:
        require_positive(self, "num_attention_heads", "head_dim")
        require(
            self.head_dim % 2 == 0,
            "head_dim",
            self.head_dim,
            "must be even: rotary embedding turns pairs",
            "use an even head_dim",
        )
        require_kind(self, "select", SELECTS)


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Grouped-query attention: `num_key_value_heads` keys and values, each shared by an equal group of query heads."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    select: Select = field(default_factory=Everything)

    def __post_init__(self) -> None:
        require_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        require(
            self.head_dim % 2 == 0,
            "head_dim",
            self.head_dim,
            "must be even: rotary embedding turns pairs",
            "use an even head_dim",
        )
        groups = self.num_key_value_heads
        rule = f"must divide num_attention_heads={self.num_attention_heads}"
        require(self.num_attention_heads % groups == 0, "num_key_value_heads", groups, rule, "use a divisor")
        require_kind(self, "select", SELECTS)


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: keys and values are read from one cached latent and one shared rotary key.

    `q_lora_rank=None` makes queries straight from the hidden state, as DeepSeek-V2-Lite does.
    """

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    select: Select = field(default_factory=Everything)

    def __post_init__(self) -> None:
        require_positive(
            self, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
        )
        if self.q_lora_rank is not None:
            require_positive(self, "q_lora_rank")
        rope = self.qk_rope_head_dim
        require(
            rope % 2 == 0, "qk_rope_head_dim", rope, "must be even: rotary embedding turns pairs", "use an even width"
        )
        require_kind(self, "select", (*SELECTS, Indexer))
        learns = self.select.learns if isinstance(self.select, Blocks) else "nothing"
        rule = "must be 'nothing' with Latent: its heads share one key of another width, which has no such form yet"
        require(learns == "nothing", "select.learns", learns, rule, "use MultiHead or Grouped, or an Indexer")
        if isinstance(self.select, Indexer):
            rule = "must not be None: the indexer reads the query latent"
            require(self.q_lora_rank is not None, "q_lora_rank", None, rule, "set it, or select otherwise")
            width = self.select.index_head_dim
            rule = f"must be at least qk_rope_head_dim={rope}, the part that is rotated"
            require(width >= rope, "index_head_dim", width, rule, "use a wider index head")

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


Attention = MultiHead | Grouped | Latent
