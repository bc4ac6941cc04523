"""What a router decided, as a value: which experts, with which weights, and how many tokens each was asked to take.

Dispatch, balance losses, bias update and load statistics all read this value. Nothing is counted in a buffer: counters
inside a forward pass count twice when activations are recomputed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The routing of N tokens to K of E experts each.

    Attributes:
        indices: the experts of each token, in no particular order.
        weights: what each expert's output is multiplied with, after normalisation and scaling. A pair that capacity
            drops keeps its weight here, and the others are not renormalised: a token that lost an expert has less
            routed output.
        scores: every expert's score without bias, in float32 or better; the router's gradient flows through these.
        counts: tokens per expert before anything is dropped, which is what balance is judged on.
        kept: which pairs an expert really takes; None when it takes all. Where experts choose tokens all E are listed
            for each token, and `kept` are the chosen.
        logits: what the scores are made of, where a loss wants it.
        router: the weight that made the logits, in their type, where a loss wants it.
        lengths: tokens of each sequence that are here, where rows were padded: padding is routed nowhere and is not
            among the N. None where sequences are equally long.
    """

    indices: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    scores: Float[Tensor, "N E"]
    counts: Int[Tensor, " E"]
    kept: Bool[Tensor, "N K"] | None = None
    logits: Float[Tensor, "N E"] | None = None
    router: Float[Tensor, "E D"] | None = None
    lengths: Int[Tensor, " B"] | None = None


def count(indices: Int[Tensor, "..."], experts: int) -> Int[Tensor, " E"]:
    """How often each expert is named."""
    flat = indices.flatten()
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
