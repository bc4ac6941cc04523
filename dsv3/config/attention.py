"""Attention is two choices: how keys and values are made, and which of them a query sees.

    MultiHead | Grouped | Latent        one K and V per head | shared by a group of heads | compressed to a latent (MLA)
      each with  select =  Everything | Window | PerHead

Sources: Vaswani et al. 2017 (MultiHead), arXiv 2305.13245 (Grouped), DeepSeek-V2 and V3, arXiv 2405.04434 and
2412.19437 section 2.1.1 (Latent). `PerHead` is the article's dynamic sparse attention in the form that can run;
`dsv3/attention/select/per_head.py` says what was repaired.
"""

from dataclasses import dataclass, field

from dsv3.config.rules import require, require_kind, require_number, require_positive


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


Select = Everything | Window | PerHead


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
        require_kind(self, "select", (Everything, Window, PerHead))


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
        require_kind(self, "select", (Everything, Window, PerHead))


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
        require_kind(self, "select", (Everything, Window, PerHead))

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


Attention = MultiHead | Grouped | Latent
