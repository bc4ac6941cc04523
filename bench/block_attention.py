"""Arms of attention to chosen blocks: the same inputs through SDPA, our kernel, plain PyTorch and FlexAttention.

One layer without its projections: q, k and v are given, choosing is inside the time. `bench.attention_sizes` says what
the arms are. So that a ratio to SDPA can be split, the kernel has a dense arm (what the code gains) and a window of as
many blocks, which is the same work without a choice (what choosing costs); `plain` and `flex` compute the very
selection of `hierarchical`. `auto` is timed by a case of its own, at short lengths too. Each of torch's fused kernels
is an arm by name as well, for a GPU, where it has several.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention_sizes import BLOCK, BRANCHING, HEADS, SEEN, WIDTH
from dsv3.attention import Implementation, Selection, SelectionCost, attend, reference, why_not_kernel, why_not_triton
from dsv3.attention.select import auto, blocks, hierarchical
from dsv3.attention.select.auto import Direction
from dsv3.attention.selection import union
from dsv3.config import Auto, Blocks, Hierarchical, vary

KERNEL = ("dense", "window", "blocks", "hierarchical", "best_first")
FORWARD_ONLY = ("flex",)
BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
AUTO: Mapping[str, Direction] = {"auto_forward": "forward", "auto_training": "training"}
_LAST = 4  # queries of a long sequence that are compared with the reference
_REFUSALS = ("No available kernel", "No viable backend")  # torch's words where a kernel is not for these inputs
_SHORT = (SEEN + 2) * BLOCK + 9  # positions of a short one, past what is seen, its last block not full


@dataclass(frozen=True)
class Inputs:
    """Queries [1, H, T, P], keys and values [1, G, T, P], and for `sdpa_fp32` the same in fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    wide: tuple[Tensor, ...]


def inputs(
    length: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    heads: int = HEADS,
    groups: int | None = None,
    width: int = WIDTH,
    seed: int = 0,
) -> Inputs:
    """Random inputs of one sequence; every query head has keys of its own, or `groups` key-value heads serve all."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, number, length, width) for number in (heads, groups or heads, groups or heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    wide = (q, k, v) if dtype == torch.float32 else tuple(x.detach().float().requires_grad_() for x in (q, k, v))
    return Inputs(q, k, v, wide)


def arms(dtype: torch.dtype, phase: str) -> tuple[str, ...]:
    """Which arms there are in that format and phase, the baseline first."""
    names = ("sdpa", "sdpa_fp32", *KERNEL, "plain", "flex")
    missing = {"sdpa_fp32"} if dtype == torch.float32 else set()
    return tuple(name for name in names if name not in missing and (phase == "forward" or name not in FORWARD_ONLY))


def why_not(arm: str, given: Inputs) -> str | None:
    """None where the arm can be computed here; otherwise what is missing."""
    if arm in BACKENDS:
        return _why_not_backend(arm, given)
    if arm not in KERNEL:
        return None
    return why_not_triton(given.q) if given.q.is_cuda else why_not_kernel(given.q)


def _why_not_backend(arm: str, given: Inputs) -> str | None:
    # which inputs a kernel takes depends on the version of torch: a call tells
    try:
        forward(arm, given)
    except RuntimeError as error:
        if not any(words in str(error) for words in _REFUSALS):
            raise
        return "torch has no such kernel for these inputs here"
    return None


def choose(arm: str, given: Inputs) -> Selection | None:
    """The arm's selection, None where it attends to everything."""
    match arm:
        case "window":
            return last_blocks(given.q.shape[2], given.q.device)
        case "blocks":
            return blocks(given.q, given.k, Blocks(k=SEEN, block_q=BLOCK, block_k=BLOCK))
        case "hierarchical" | "plain" | "flex":
            return hierarchical(given.q, given.k, tree("beam"))
        case "best_first":
            return hierarchical(given.q, given.k, tree("best_first"))
        case "auto_forward" | "auto_training":
            choice = _behind_crossover(given.q.dtype, AUTO[arm])
            return hierarchical(given.q, given.k, choice) if given.q.shape[2] > choice.crossover else None
    return None


@cache
def _behind_crossover(dtype: torch.dtype, direction: Direction) -> Auto:
    """As a config has it: looked up once, outside the time."""
    return auto(tree("beam"), dtype, direction)


def tree(search: Any) -> Hierarchical:
    """The choice down a tree, by "beam" or "best_first"."""
    return Hierarchical(k=SEEN, block_q=BLOCK, block_k=BLOCK, branching=BRANCHING, search=search)


def last_blocks(length: int, device: torch.device | str = "cpu") -> Selection:
    """Every block of queries sees its own block and those before it, `SEEN` in all."""
    own = torch.arange(-(-length // BLOCK), device=device)
    listed = own[:, None] - torch.arange(SEEN - 1, -1, -1, device=device)
    counts = (listed >= 0).sum(dim=1)
    order = torch.where(listed >= 0, listed, 2**30).sort(dim=1).values
    kept = sum(min(position // BLOCK, SEEN - 1) * BLOCK + position % BLOCK + 1 for position in range(length))
    return Selection(
        indices=order.masked_fill(order == 2**30, 0)[None, None],
        counts=counts[None, None],
        block_q=BLOCK,
        block_k=BLOCK,
        cost=SelectionCost(scored=0, kept=kept),
    )


def attended(arm: str, given: Inputs) -> tuple[Tensor, ...]:
    """Queries, keys and values in the arm's format."""
    return given.wide if arm == "sdpa_fp32" else (given.q, given.k, given.v)


def operations(arm: str, given: Inputs, phase: str) -> int:
    """FLOPs of the arm's products over the pairs of a query and a key that it sees: 2 products forward, 5 backward.

    Masked pairs and the scores of choosing are not in it, though their time is in the arm's.
    """
    heads, length, width = given.q.shape[1:]
    selection, products = choose(arm, given), {"forward": 2, "forward_backward": 7}[phase]
    if selection is None:
        return products * 2 * width * heads * length * (length + 1) // 2
    return products * 2 * width * selection.cost.kept * heads // selection.indices.shape[1]


def forward(arm: str, given: Inputs) -> Tensor:
    """The arm's output, choosing included."""
    q, k, v = attended(arm, given)
    selection = choose(arm, given)
    if arm == "flex":
        assert selection is not None, "flex computes a selection"
        return _flex(q.detach(), k.detach(), v.detach(), selection)
    if arm in AUTO:
        return attend(q, k, v, selection)
    if arm in BACKENDS:
        with sdpa_kernel(BACKENDS[arm]):
            return attend(q, k, v, implementation="plain")
    ours: Implementation = "triton" if q.is_cuda else "kernel"
    return attend(q, k, v, selection, implementation=ours if arm in KERNEL else "plain")


def inference(arm: str, given: Inputs) -> Tensor:
    """Forward alone, no graph kept."""
    with torch.no_grad():
        return forward(arm, given)


def training(arm: str, given: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward: the output and the gradients of q, k and v."""
    q, k, v = attended(arm, given)
    out = forward(arm, given)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), q.detach())


def seeing(number: int, given: Inputs) -> Tensor:
    """Forward of the kernel on `number` blocks found down the tree of means, choosing included, no graph kept."""
    with torch.no_grad():
        selection = hierarchical(given.q, given.k, vary(tree("beam"), k=number))
        return attend(given.q, given.k, given.v, selection, implementation="triton" if given.q.is_cuda else "kernel")


def searches(length: int, block_q: int, seed: int) -> dict[str, Callable[[], Selection]]:
    """The flat choice and the tree's in one head, for every `block_q` queries."""
    given = inputs(length, torch.float32, heads=1, seed=seed)
    q, k = given.q.detach(), given.k.detach()
    return {
        "blocks": lambda: blocks(q, k, Blocks(k=SEEN, block_q=block_q, block_k=BLOCK)),
        "hierarchical": lambda: hierarchical(q, k, vary(tree("beam"), block_q=block_q)),
    }


def check(arm: str, given: Inputs) -> None:
    """The arm computes what the reference does on its selection: the last queries, and a short sequence with gradients.

    Raises:
        AssertionError: with the largest difference, where it does not.
    """
    right, _ = _right(arm, given, _LAST)
    _compare(arm, inference(arm, given)[:, :, -_LAST:], right.detach())
    short = inputs(_SHORT, given.q.dtype, given.q.device, heads=1, seed=1)
    right, leaves = _right(arm, short, _SHORT)
    if arm in FORWARD_ONLY:
        _compare(arm, inference(arm, short), right.detach())
        return
    grads = torch.autograd.grad(right, leaves, leaves[0].detach())
    for ours, theirs in zip(training(arm, short), (right.detach(), *grads), strict=True):
        _compare(arm, ours, theirs)


def check_heads(arm: str, given: Inputs) -> None:
    """The arm computes what plain PyTorch does in float64 on its selection: the last block of queries, and a short
    sequence of as many heads with gradients. Takes seconds where `check`, query by query, takes some for each head.

    Raises:
        AssertionError: with the largest difference, where it does not.
    """
    (heads, length, width), groups = given.q.shape[1:], given.k.shape[1]
    selection = choose(arm, given)
    last = None if selection is None else _row(selection)
    first = (length - 1) // BLOCK * BLOCK
    right, _ = _in_float64(given.q[:, :, first:], given.k, given.v, last)
    _compare(arm, inference(arm, given)[:, :, first:], right.detach())
    short = inputs(_SHORT, given.q.dtype, given.q.device, heads=heads, groups=groups, width=width, seed=1)
    right, leaves = _in_float64(short.q, short.k, short.v, choose(arm, short))
    grads = torch.autograd.grad(right, leaves, leaves[0].detach())
    for ours, theirs in zip(training(arm, short), (right.detach(), *grads), strict=True):
        _compare(arm, ours, theirs)


def _in_float64(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Attention in plain PyTorch, and the leaves that it was computed from."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    return attend(q, k, v, selection, implementation="plain"), (q, k, v)


def per_token(length: int) -> tuple[Inputs, Selection, Tensor]:
    """One head's forward pass in fp32 in which every token chooses for itself down a tree, inputs made first."""
    given = inputs(length, torch.float32, heads=1)
    choice = Hierarchical(k=SEEN, block_q=1, block_k=BLOCK, branching=BRANCHING)
    with torch.no_grad():
        selection = hierarchical(given.q, given.k, choice)
        return given, selection, attend(given.q, given.k, given.v, selection)


def union_bytes(choice: Blocks | None, length: int, heads: int) -> int:
    """Bytes of fp32 keys and values that one key-value head with `heads` query heads hands out over a whole sequence of
    random numbers, a block of queries at a time, each block of keys once; None: to dense attention.
    """
    if choice is None:
        keys = sum(range(BLOCK, length, BLOCK)) + length
    else:
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, number, length, WIDTH, generator=generator) for number in (heads, 1))
        selection = hierarchical(q, k, choice) if isinstance(choice, Hierarchical) else blocks(q, k, choice)
        keys = int(union(selection, 1, length, rows=BLOCK // choice.block_q).sum())
    return keys * 2 * WIDTH * torch.finfo(torch.float32).bits // 8


def last_query_error(given: Inputs, selection: Selection, out: Tensor) -> float:
    """How far the last query's output lies from the reference on the same selection."""
    seen = reference.selected(_row(selection), heads=1, queries=1, total=given.k.shape[2])
    right = reference.attention(given.q[:, :, -1:], given.k, given.v, seen, scale=WIDTH**-0.5).detach()
    return float((out[:, :, -1:].double() - right).abs().max())


def _row(selection: Selection) -> Selection:
    """The selection of its last block of queries alone."""
    return replace(selection, indices=selection.indices[:, :, -1:], counts=selection.counts[:, :, -1:])


def _right(arm: str, given: Inputs, queries: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reference's output for the last queries, and the float64 leaves that it was computed from."""
    heads, length = given.q.shape[1:3]
    selection, seen = choose(arm, given), cast(reference.Seen, reference.everything)
    if selection is not None:
        seen = reference.selected(selection, heads=heads, queries=length, total=length)
    q, k, v = (x.detach().double().requires_grad_() for x in (given.q[:, :, -queries:], given.k, given.v))
    return reference.attention(q, k, v, seen, scale=q.shape[3] ** -0.5), (q, k, v)


def _compare(arm: str, ours: Tensor, right: Tensor) -> None:
    # sums of up to a thousand products in orders of their own; in bf16 the weights are rounded before they multiply
    scale = 64 if ours.dtype == torch.float32 else 4
    bound = scale * torch.finfo(ours.dtype).eps * max(1.0, right.abs().max().item())
    torch.testing.assert_close(ours.double(), right.double(), rtol=0.0, atol=bound, msg=partial("{}: {}".format, arm))


def _flex(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask

    # it asks for a column per block of keys; what lies behind the counts is not read. All listed blocks pass as partly
    # seen: telling the whole ones apart would take an index of its own
    columns = -(-k.shape[2] // BLOCK)
    listed = F.pad(selection.indices.int(), (0, columns - selection.indices.shape[-1]))
    mask = BlockMask.from_kv_blocks(
        selection.counts.int(),
        listed,
        BLOCK_SIZE=BLOCK,
        mask_mod=_causal,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    out: Tensor = _compiled_flex()(q, k, v, block_mask=mask)
    return out


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
