"""Send each token to its experts and add up what comes back.

    y_n = sum_k w_nk E_k(x_n),    E(x) = (silu(x W_gate) * (x W_up)) W_down

Weights are stacked and stored inputs before outputs, gate_up [E, D, 2F] and down [E, F, D]; Hugging Face stores the
transposes. Every implementation has the signature `Dispatch`, computes in x's type and sums in float32 or better:

    reference    one expert after the other in the plainest form; any floating type
    grouped      torch's grouped matrix product over sorted rows; float32, bfloat16 and float16
    looped       a loop of matrix products over sorted rows with a backward that keeps less; any floating type
    padded       one batched matrix product, every expert filled up to as many rows; any floating type
    kernel       the same in C++, where a compiler is at hand; on a CPU, float32 and bfloat16
    triton       the same on a GPU, where Triton is at hand; tokens are gathered inside the products; no float64
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config.rules import require
from dsv3.layers.swiglu import swiglu
from dsv3.moe.capacity import place_in_queue
from dsv3.moe.fastest import WITHOUT, Direction, fastest, in_words
from dsv3.moe.kernels import triton_experts
from dsv3.moe.kernels.experts import FORMATS, fits, instruction_sets, kernel_experts, why_not
from dsv3.moe.looped import looped_experts, sum_dtype
from dsv3.moe.memory import ReusedMemory
from dsv3.moe.routing import Routing, count

Dispatch = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]

GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # formats of torch's grouped product


class Rows(NamedTuple):
    """Token-expert pairs sorted by expert: the token of each, its gate weight, and how many pairs each expert takes."""

    token: Int[Tensor, " M"]
    weight: Float[Tensor, " M"]
    counts: Int[Tensor, " E"]


def sort_pairs(routing: Routing) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " E"]]:
    """The pairs, counted token after token, in the order of the experts, within an expert in that of the batch; those
    that no expert takes come last. And how many each expert takes.
    """
    experts, indices, counts = len(routing.counts), routing.indices, routing.counts
    if routing.kept is not None:
        indices = indices.masked_fill(~routing.kept, experts)
        counts = count(indices, experts + 1)[:experts]
    return indices.flatten().argsort(stable=True), counts


def sort_rows(routing: Routing, *, cut: bool = True) -> Rows:
    """The pairs in the order of the experts, within an expert in the order of the batch.

    Pairs that no expert takes are cut off, or with `cut=False` come last without being counted: their number depends
    on the data, and a compiled graph has fixed shapes.
    """
    order, counts = sort_pairs(routing)
    if routing.kept is not None and cut:
        order = order[: int(counts.sum())]
    return Rows(order // routing.indices.shape[1], routing.weights.flatten()[order], counts)


def reference(
    x: Float[Tensor, "N D"],
    routing: Routing,
    gate_up: Float[Tensor, "E D twoF"],
    down: Float[Tensor, "E F D"],
    product: Product = torch.matmul,
) -> Float[Tensor, "N D"]:
    """The slow truth that the others are tested against; another `product` of two matrices may stand in for torch's."""
    y = torch.zeros_like(x, dtype=sum_dtype(x))
    for expert, (gate_up_DG, down_FD) in enumerate(zip(gate_up, down, strict=True)):
        taken = routing.indices == expert
        token, slot = (taken if routing.kept is None else taken & routing.kept).nonzero(as_tuple=True)
        gate, up = product(x[token], gate_up_DG).chunk(2, dim=-1)
        out = product(swiglu(gate, up), down_FD)
        y = y.index_add(0, token, out.to(y.dtype) * routing.weights[token, slot, None].to(y.dtype))
    return y.to(x.dtype)


def grouped(
    x: Float[Tensor, "N D"], routing: Routing, gate_up: Float[Tensor, "E D twoF"], down: Float[Tensor, "E F D"]
) -> Float[Tensor, "N D"]:
    """`torch.nn.functional.grouped_mm` on sorted rows."""
    token, weight, counts = sort_rows(routing)
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[token], gate_up, offs=ends).chunk(2, dim=-1)
    a = swiglu(gate, up) * weight.to(x.dtype)[:, None]
    out = F.grouped_mm(a, down, offs=ends).to(sum_dtype(x))
    return torch.zeros_like(x, dtype=out.dtype).index_add(0, token, out).to(x.dtype)


def looped(
    x: Float[Tensor, "N D"],
    routing: Routing,
    gate_up: Float[Tensor, "E D twoF"],
    down: Float[Tensor, "E F D"],
    memory: tuple[ReusedMemory, ReusedMemory] | None = None,
) -> Float[Tensor, "N D"]:
    """`dsv3.moe.looped` on sorted rows; `memory` is lent to the gradients of the weights."""
    token, weight, counts = sort_rows(routing, cut=not torch.compiler.is_compiling())
    return looped_experts(x, weight.to(x.dtype), gate_up, down, token, counts, memory).to(x.dtype)


def padded(
    x: Float[Tensor, "N D"],
    routing: Routing,
    gate_up: Float[Tensor, "E D twoF"],
    down: Float[Tensor, "E F D"],
    capacity: int | None = None,
) -> Float[Tensor, "N D"]:
    """The experts as one batched product over `capacity` rows each; None: as many as the fullest takes.

    A capacity (`dsv3.moe.capacity.expert_capacity`) makes every shape static: a graph without a break, and no more rows
    than the factor pays for. Of an expert's pairs those behind its capacity are dropped, the last in the batch; where
    `drop` came before there are none. Empty rows are zeros: they cost a product, and neither give nor get anything.
    """
    (tokens, k), experts = routing.indices.shape, len(routing.counts)
    slot_NK, capacity = slots(routing, capacity)
    slot, rows = slot_NK.flatten(), experts * capacity
    nobody = slot.new_full((rows + 1,), tokens)
    token = nobody.scatter(0, slot, torch.arange(tokens * k, device=x.device) // k)[:rows]
    weight = routing.weights.new_zeros(rows + 1).scatter(0, slot, routing.weights.flatten())[:rows]
    x_ECD = F.pad(x, (0, 0, 0, 1))[token].view(experts, capacity, x.shape[1])
    gate, up = torch.bmm(x_ECD, gate_up).chunk(2, dim=-1)
    a_ECF = swiglu(gate, up) * weight.to(x.dtype).view(experts, capacity, 1)
    out = F.pad(torch.bmm(a_ECF, down).flatten(0, 1), (0, 0, 0, 1))
    return out[slot_NK].sum(1, dtype=sum_dtype(x)).to(x.dtype)


def slots(routing: Routing, capacity: int | None) -> tuple[Int[Tensor, "N K"], int]:
    """Each pair's row in a batch of `capacity` rows an expert, or for a dropped one the row after the last; and the
    capacity, if None is given the largest load.

    Raises:
        ValueError: a capacity below 0.
    """
    experts, indices = len(routing.counts), routing.indices
    if routing.kept is not None:
        indices = indices.masked_fill(~routing.kept, experts)
    if capacity is None:
        capacity = int(count(indices, experts + 1)[:experts].max())
    require(capacity >= 0, "capacity", capacity, "must be at least 0", "dsv3.moe.capacity.expert_capacity computes one")
    place = place_in_queue(indices, None)
    dropped = (place >= capacity) | (indices == experts)
    return (indices * capacity + place).masked_fill(dropped, experts * capacity), capacity


def kernel(
    x: Float[Tensor, "N D"],
    routing: Routing,
    gate_up: Float[Tensor, "E D twoF"],
    down: Float[Tensor, "E F D"],
    memory: tuple[ReusedMemory, ReusedMemory] | None = None,
    instructions: str = "",
) -> Float[Tensor, "N D"]:
    """`dsv3.moe.kernels` on sorted rows; `memory` is lent to the gradients of the weights."""
    token, weight, counts = sort_rows(routing, cut=not torch.compiler.is_compiling())
    return kernel_experts(x, weight, gate_up, down, token, counts, memory, instructions=instructions)


def triton(
    x: Float[Tensor, "N D"], routing: Routing, gate_up: Float[Tensor, "E D twoF"], down: Float[Tensor, "E F D"]
) -> Float[Tensor, "N D"]:
    """`dsv3.moe.kernels.triton_experts` on sorted pairs."""
    pair, counts = sort_pairs(routing)
    dropping = routing.kept is not None
    return triton_experts.triton_experts(x, routing.weights, gate_up, down, pair.int(), counts, dropping=dropping)


def choose(
    x: Float[Tensor, "N D"],
    routing: Routing,
    down: Float[Tensor, "E F D"],
    memory: tuple[ReusedMemory, ReusedMemory] | None = None,
) -> Dispatch:
    """The implementation for these tensors; `memory` is for those that lend it to gradients.

    On a CPU `fastest` says which, of those that can be: the grouped product needs widths that are whole multiples of 16
    bytes. On a GPU our Triton kernel, where it runs, keeps less than the grouped product, which is one kernel there;
    which is the faster has not been timed.
    """
    aligned = all(width * x.element_size() % 16 == 0 for width in down.shape[1:])
    if x.device.type == "cpu":
        training = torch.is_grad_enabled() and down.requires_grad
        instructions = kernel_instructions() if fits(x, down) else WITHOUT
        rows = routing.indices.numel() / len(down)
        name = fastest(instructions, x.dtype, "training" if training else "forward", rows)
        if name == "kernel":
            return partial(kernel, memory=memory)
        return grouped if name == "grouped" and aligned else partial(looped, memory=memory)
    if x.dtype in triton_experts.FORMATS and triton_experts.why_not(x.device.type) is None:
        return triton
    return grouped if x.dtype in GROUPED and aligned else partial(looped, memory=memory)


def kernel_instructions() -> str:
    """What the C++ kernel computes with on this processor; "none" where it cannot be had. It is built now."""
    return instruction_sets()[0] if why_not() is None else WITHOUT


def chosen_here() -> dict[str, str]:
    """What `choose` takes on this CPU, in words: the kernel's instructions, and by format and direction the dispatch.

    Of widths that the kernel computes; where it cannot compute the format, the table's entries without it hold.
    """
    instructions = kernel_instructions()
    found = {"instructions": instructions}
    for dtype in GROUPED:
        for direction in get_args(Direction):
            entry = in_words(instructions if dtype in FORMATS else WITHOUT, dtype, direction)
            found[f"{str(dtype).removeprefix('torch.')} {direction}"] = entry
    return found
