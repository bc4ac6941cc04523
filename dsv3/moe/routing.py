"""What a router decided, as a value: which experts, with which weights, and how many tokens each expert was asked to take.

Everything downstream (dispatch, balance losses, bias update, load statistics) reads this value; nothing is counted in a buffer, because counters
inside a forward pass count twice when activations are recomputed.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The routing of N tokens to K of E experts each.

    Attributes:
        indices: the experts of each token, in no particular order.
        weights: what each expert's output is multiplied with, after normalisation and scaling. A pair that capacity drops keeps its weight here;
            the others are not renormalised, so a token that lost an expert has a smaller routed output.
        scores: every expert's score without bias, in at least float32; the router's gradient flows through these.
        counts: tokens per expert before anything is dropped, which is what balance is judged on.
        kept: which pairs an expert really takes; None when nothing is dropped.
    """

    indices: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    scores: Float[Tensor, "N E"]
    counts: Int[Tensor, " E"]
    kept: Bool[Tensor, "N K"] | None = None
