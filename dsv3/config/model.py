"""The whole model: what stacks, how wide, which attention, which experts, how many tokens ahead it predicts.

Field names are those of DeepSeek's published config.json, so that a reader of one can read the other.
"""

from dataclasses import dataclass, field
from typing import Literal

from dsv3.config.attention import Attention, Grouped, Latent, MultiHead
from dsv3.config.layers import Rope
from dsv3.config.moe import MoE
from dsv3.config.rules import require, require_kind, require_number, require_positive


@dataclass(frozen=True, kw_only=True)
class MTP:
    """Multi-token prediction (arXiv 2412.19437 section 2.2): a chain of modules, each one token further ahead.

    `hidden` says which hidden state feeds the first module: before the final norm (the paper's equation) or after it
    (what the released checkpoint's readers do). Both are normalised again, so they differ by that norm's weights alone.
    """

    num_nextn_predict_layers: int = 1
    hidden: Literal["pre_norm", "post_norm"] = "post_norm"

    def __post_init__(self) -> None:
        require_positive(self, "num_nextn_predict_layers")
        require(
            self.hidden in ("pre_norm", "post_norm"), "hidden", self.hidden, "must be pre_norm or post_norm", "pick one"
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder of `num_hidden_layers` blocks: the first `first_k_dense_replace` dense, the others with `moe`.

    Initial weights have standard deviation `initializer_range`; the embedding `embedding_range`, where that is given.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    attention: Attention
    moe: MoE | None = None
    first_k_dense_replace: int = 0
    mtp: MTP | None = None
    rope: Rope = field(default_factory=Rope)
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    embedding_range: float | None = None

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"
        )
        require_kind(self, "attention", (MultiHead, Grouped, Latent))
        require_number(self, "first_k_dense_replace", low=0, high=self.num_hidden_layers)
        require_number(self, "rms_norm_eps", low=0.0, above=True)
        require_number(self, "initializer_range", low=0.0, above=True)
        if self.embedding_range is not None:
            require_number(self, "embedding_range", low=0.0, above=True)
        for name, kind in (("moe", MoE), ("mtp", MTP)):
            value = getattr(self, name)
            require(
                value is None or isinstance(value, kind), name, value, f"must be None or {kind.__name__}", "pass one"
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (counted from 0; multi-token prediction modules follow the last) has experts."""
        return self.moe is not None and layer >= self.first_k_dense_replace
