"""Arms of attention: the same inputs through dense and selected attention, for the cases and the study of attention.

What is timed is attention itself, one layer without its projections: q, k and v are given, but selecting is inside,
with the linear map, the sorting and the gathering. Inputs are random numbers in fp32; `bench.attention_sizes` says what
the arms are and how large.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.attention_sizes import HEADS, KEEP, KEPT, KEYS, WIDTH
from dsv3.attention import Implementation, Selection, attend, eager, reference, why_not_kernel
from dsv3.attention.select import blocks, per_head, window
from dsv3.config import Blocks

KERNEL = ("dense", "window", "blocks_share")
_LAST = 16  # queries of a long sequence that are compared with the reference
_SHORT = 272  # positions of a short one, two blocks of queries per head, compared in two heads with their gradients


@dataclass(frozen=True)
class Inputs:
    """One layer's inputs: queries, keys and values, hidden states x and the map that reads importance from them."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    weight: Tensor

    def importance(self) -> Tensor:
        """One score per head and token, [1, H, T]."""
        return (self.x @ self.weight.T).transpose(1, 2)

    def leaves(self) -> tuple[Tensor, ...]:
        """Everything that a gradient may reach."""
        return self.q, self.k, self.v, self.x, self.weight


def inputs(length: int, device: torch.device | str = "cpu", *, heads: int = HEADS, seed: int = 0) -> Inputs:
    """Random inputs of one sequence."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    q, k, v = (draw(1, heads, length, WIDTH) for _ in range(3))
    weight = (draw(heads, heads * WIDTH) * (heads * WIDTH) ** -0.5).detach().requires_grad_()
    return Inputs(q, k, v, draw(1, length, heads * WIDTH), weight)


def choose(arm: str, given: Inputs) -> Selection | None:
    """The arm's selection, None for dense ones."""
    length, device = given.q.shape[2], given.q.device
    match arm:
        case "window":
            return window(1, length, length, size=KEYS, device=device)
        case "per_head_share":
            return per_head(given.importance(), length, keep=KEEP)
        case "per_head_dropped":
            return per_head(given.importance(), length, keep=KEPT)
        case "per_head_number":
            return per_head(given.importance(), length, k=KEYS)
        case "blocks_share":
            return blocks(given.q, given.k, Blocks(keep=KEEP))
    return None


def why_not(arm: str, given: Inputs) -> str | None:
    """None where the arm can be computed here; otherwise what is missing."""
    return why_not_kernel(given.q) if arm in KERNEL else None


def forward(arm: str, given: Inputs) -> Tensor:
    """The arm's output, selection included."""
    if arm == "eager":
        return eager(given.q, given.k, given.v, scale=WIDTH**-0.5)
    implementation: Implementation = "kernel" if arm in KERNEL else "plain"
    return attend(given.q, given.k, given.v, choose(arm, given), implementation=implementation)


def inference(arm: str, given: Inputs) -> Tensor:
    """Forward alone, no graph kept."""
    with torch.no_grad():
        return forward(arm, given)


def training(arm: str, given: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward: the output and the gradients of the leaves that the arm uses; none is kept on a leaf."""
    out = forward(arm, given)
    used = given.leaves() if arm.startswith("per_head") else given.leaves()[:3]
    return out.detach(), *torch.autograd.grad(out, used, given.v.detach())


def check(arm: str, given: Inputs) -> None:
    """The arm computes what the reference does: the last queries of these inputs, and a short sequence with gradients.

    Raises:
        AssertionError: with the largest difference, where it does not.
    """
    right = _right(arm, given, given.q[:, :, -_LAST:])
    _compare(arm, inference(arm, given)[:, :, -_LAST:], right.detach())
    length = _SHORT + (KEYS if arm == "window" else 0)  # so that some keys lie outside
    short = inputs(length, given.q.device, heads=2, seed=1)
    right = _right(arm, short, short.q)
    found = training(arm, short)
    grads = torch.autograd.grad(right, short.leaves()[: len(found) - 1], short.v.detach().double())
    for ours, theirs in zip(found, (right.detach(), *grads), strict=True):
        _compare(arm, ours, theirs)


def _right(arm: str, given: Inputs, queries: Tensor) -> Tensor:
    importance = given.importance()
    seen: reference.Seen = reference.everything
    weights = None
    match arm:
        case "window":
            seen = reference.window(KEYS)
        case "per_head_share":
            seen, weights = reference.per_head(importance, keep=KEEP), importance
        case "per_head_dropped":
            seen, weights = reference.per_head(importance, keep=KEPT), importance
        case "per_head_number":
            seen, weights = reference.per_head(importance, k=KEYS), importance
        case "blocks_share":
            selection, length = choose(arm, given), given.k.shape[2]
            assert selection is not None, "the blocks are a selection"
            seen = reference.selected(selection, heads=given.q.shape[1], queries=length, total=length)
    return reference.attention(queries, given.k, given.v, seen, scale=WIDTH**-0.5, weights=weights)


def _compare(arm: str, ours: Tensor, right: Tensor) -> None:
    # sums of up to a few thousand products in fp32, in orders of their own
    bound = 64 * torch.finfo(ours.dtype).eps * max(1.0, right.abs().max().item())
    torch.testing.assert_close(ours.double(), right.double(), rtol=0.0, atol=bound, msg=partial("{}: {}".format, arm))
