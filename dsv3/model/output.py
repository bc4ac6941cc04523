"""What a forward pass returns, as one value: nothing is counted, cached or remembered inside the model."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dsv3.attention.cache import KeyValueCache
from dsv3.attention.selection import Selection
from dsv3.moe import Routing


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """The result of `Transformer.forward` on tokens t_0 ... t_{T-1}.

    Attributes:
        logits: position i predicts t_{i+1}.
        mtp_logits: one tensor [B, T-m, V] per depth m = 1, 2, ...; position i predicts t_{i+1+m}. Empty when decoding
            with a cache. Of packed documents the last m positions of each mean nothing.
        routing: what the router of each expert layer decided, bottom to top, multi-token prediction last; dense
            layers have none.
        selection: which keys each layer's attention kept, bottom to top, multi-token prediction last; None for dense
            attention. In training an indexer's carries its loss. Of packed documents one each, row by row, in every
            layer.
        cache: the cache with these tokens in it, when one was given.
    """

    logits: Float[Tensor, "B T V"]
    mtp_logits: tuple[Float[Tensor, "B _ V"], ...] = ()
    routing: tuple[Routing, ...] = ()
    selection: tuple[Selection | None, ...] = ()
    cache: KeyValueCache | None = None
