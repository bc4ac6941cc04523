"""The Triton kernel as operators that torch knows, `dsv3_triton`: attention to a selection on a GPU.

The tiles and the order of the work are told in `triton_passes`, which is imported where Triton is. Lists are checked,
sorted and rid of repeats as the plain path's are; backward inverts them: sorted by their keys, the blocks of queries
that list a block of keys are neighbours. Nothing beyond inputs, results and gradients grows with the sequence but the
lists and two numbers per query and head.

On a CPU the same kernels run in Triton's interpreter, which is how they are tested where there is no GPU. Its bf16
holds numbers but does not multiply them: products are of fp32 there.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.attention.kernels import registration
from dsv3.attention.selection import Selection, SelectionCost, tidy
from dsv3.config.rules import require

NAME = "dsv3_triton"
SELECTION = (
    "Tensor? indices, Tensor? counts, int block_q, int block_k, float scale, Tensor? weights, Tensor? rank, "
    "Tensor? limit, Tensor? bias"
)
LOG2E = math.log2(math.e)
LEAST = 16  # rows, columns and widths of a product
WIDEST = 256  # of q and k; a tile of wider ones leaves shared memory no room for the other
TILE = {torch.float32: 32, torch.bfloat16: 64}  # rows and columns at most: larger ones spill registers


@torch.compiler.assume_constant_result  # the compiler runs it and keeps the answer
def why_not(device: str, width: int) -> str | None:
    """None once the operators exist and run on queries of this width on a device; otherwise the reason why not."""
    reason = _missing(device)
    if reason is None and width > WIDEST:
        reason = f"its tiles hold widths of at most {WIDEST}, not {width}"
    if reason is None:
        _define()
    return reason


@functools.cache
def _missing(device: str) -> str | None:
    if device not in ("cuda", "cpu"):
        return f"it runs on a GPU, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing; install it on Linux (pip install triton)"
    import triton
    from triton import language

    from dsv3.attention.kernels import triton_passes

    # what Triton was told when it was imported holds for its own functions, what it is told later for ours
    compiled = {isinstance(function, triton.JITFunction) for function in (language.max, triton_passes.forward)}
    if device == "cpu" and compiled != {False}:
        return "it runs on a GPU, or interpreted on a CPU where TRITON_INTERPRET=1 is set before Python starts"
    if device == "cuda" and compiled != {True}:
        return "TRITON_INTERPRET=1 has it interpreted, on a CPU"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "it multiplies bf16, which GPUs before 2020 do not"
    return None


def block_attention(
    q: Float[Tensor, "B H T P"],
    k: Float[Tensor, "B G S P"],
    v: Float[Tensor, "B G S R"],
    selection: Selection | None,
    *,
    scale: float,
) -> Float[Tensor, "B H T R"]:
    """Attention of the last T of S positions to the selected keys, None: to all up to their own; fp32 or bf16.

    A query that sees no key gets zero.

    Raises:
        RuntimeError: where the kernel cannot run.
        ValueError: for another number format, a bias, or lists that name blocks which do not exist.
    """
    reason = why_not(q.device.type, q.shape[3])
    if reason is not None:
        raise RuntimeError(f"the Triton kernel of attention is not at hand: {reason}")
    bias = None if selection is None or selection.bias is None else tuple(selection.bias.shape)
    rule = "must be None: the Triton kernel adds no bias to listed blocks"
    require(bias is None, "selection.bias.shape", bias, rule, "leave the implementation out")
    out: Tensor = torch.ops.dsv3_triton.forward(*registration.arguments(q, k, v, selection, scale))[0]
    return out


@functools.cache
def _define() -> None:
    operands = "Tensor q, Tensor k, Tensor v, "
    torch.library.define(f"{NAME}::forward", f"({operands}{SELECTION}) -> (Tensor, Tensor)")
    operands = f"Tensor grad, {operands}Tensor out, Tensor lse, "
    torch.library.define(f"{NAME}::backward", f"({operands}{SELECTION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    torch.library.impl(f"{NAME}::forward", ("cpu", "cuda"), _forward)
    torch.library.impl(f"{NAME}::backward", ("cpu", "cuda"), _backward)
    registration.register(NAME, lambda q, k, weights: max(weights.shape[1], k.shape[1]))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    *rule: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from dsv3.attention.kernels import triton_passes

    call = _Call.of(q, k, v, indices, counts, block_q, block_k, rule[:3])
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
    inputs = (*call.operands, *call.strides, *call.lists, *call.rule)
    grid, tile = call.by_queries()
    with torch.cuda.device_of(q):
        triton_passes.forward[grid](*inputs, out, lse, call.shape, scale * LOG2E, **tile)
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    *rule: Tensor | None,
) -> tuple[Tensor, ...]:
    from dsv3.attention.kernels import triton_passes

    call = _Call.of(q, k, v, indices, counts, block_q, block_k, rule[:3])
    grad, out, lse = _in_rows(grad.to(q.dtype)), out.contiguous(), lse.contiguous()
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    batch, apart = (0, q.shape[1]) if rule[0] is None else (q.shape[0], q.shape[1] // call.stack)
    grad_w = lse.new_empty(batch, apart, k.shape[2])
    delta = torch.empty_like(lse)
    inputs, scales = (grad, *call.operands, grad.stride()[:3], *call.strides), (scale * LOG2E, scale)
    with torch.cuda.device_of(q):
        grid, tile = call.by_queries()
        of_queries = (out, lse, delta, grad_q)
        triton_passes.query_grads[grid](*inputs, *call.lists, *call.rule, *of_queries, call.shape, *scales, **tile)
        grid, tile = call.by_keys()
        of_keys = (lse, delta, grad_k, grad_v, grad_w)
        triton_passes.key_grads[grid](*inputs, *call.inverse(), *call.rule, *of_keys, call.shape, *scales, **tile)
    return grad_q, grad_k, grad_v, grad_w, lse.new_empty(0, q.shape[1], 0, 0)


@dataclass(frozen=True)
class _Call:
    """What all passes of a call share.

    lists   blocks of keys in order, [B, h, Nq, K], and how many of them
    stack   query heads that read the same keys by the same lists
    shape   query heads, key-value heads, heads of the lists, queries, keys, block_q, block_k, K
    """

    operands: tuple[Tensor, Tensor, Tensor]
    lists: tuple[Int[Tensor, "B h Nq K"], Int[Tensor, "B h Nq"]]
    rule: tuple[Tensor | None, ...]
    stack: int
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor | None,
        counts: Tensor | None,
        block_q: int,
        block_k: int,
        rule: tuple[Tensor | None, ...],
    ) -> "_Call":
        kind = str(q.dtype).removeprefix("torch.")
        require(q.dtype in registration.FORMATS, "dtype", kind, "must be float32 or bfloat16", "convert q, k and v")
        (heads, queries), (groups, total) = q.shape[1:3], k.shape[1:3]
        if indices is None or counts is None:
            indices, counts = _every_block(len(q), queries, total, block_q, block_k, q.device)
        else:
            nothing = SelectionCost(scored=0, kept=0)
            given = Selection(indices=indices, counts=counts, block_q=block_q, block_k=block_k, cost=nothing)
            tidied = tidy(given, queries, total)
            indices, counts = tidied.indices, tidied.counts
        shared, most = indices.shape[1], indices.shape[3]
        kinds = (torch.float32, torch.int64, torch.int64)
        return cls(
            operands=(_in_rows(q), _in_rows(k), _in_rows(v)),
            lists=(indices.int().contiguous(), counts.int().contiguous()),
            rule=tuple(None if x is None else x.to(kind).contiguous() for x, kind in zip(rule, kinds, strict=True)),
            stack=1 if shared == heads else heads // groups,
            shape=(heads, groups, shared, queries, total, block_q, block_k, most),
        )

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        return tuple(x.stride()[:3] for x in self.operands)

    def by_queries(self) -> tuple[tuple[int], dict[str, Any]]:
        """The programs of a pass over tiles of queries, and what is compiled into them."""
        heads, _, _, queries, _, block_q, block_k, most = self.shape
        tile = self._tile(rows=block_q * self.stack, columns=most * block_k)
        blocks = -(-queries // block_q) * -(-block_q * self.stack // tile["ROWS"])
        return (len(self.operands[0]) * (heads // self.stack) * blocks,), tile

    def by_keys(self) -> tuple[tuple[int], dict[str, Any]]:
        """The same over tiles of keys, whose rows come from as many blocks of queries as list them."""
        _, groups, _, _, total, _, block_k, _ = self.shape
        tile = self._tile(rows=max(TILE.values()), columns=block_k)
        blocks = -(-total // block_k) * -(-block_k // tile["COLUMNS"])
        return (len(self.operands[0]) * groups * blocks,), tile

    def _tile(self, rows: int, columns: int) -> dict[str, Any]:
        """A tile that holds so many rows and columns if it can; the last two numbers are guesses, never timed."""
        q, _, v = self.operands
        (wide, rest), long = _parts(q.shape[3]), max(_power(v.shape[3]), LEAST)
        side, width = TILE[q.dtype], wide + rest + long
        while side > LEAST and side * width * q.element_size() > _room(q.device):
            side //= 2
        return {
            "WIDTH": q.shape[3],
            "VALUE": v.shape[3],
            "WIDE": wide,
            "REST": rest,
            "LONG": long,
            "STACK": self.stack,
            "ROWS": min(max(_power(rows), LEAST), side),
            "COLUMNS": min(max(_power(columns), LEAST), side),
            "EXACT": q.dtype == torch.float32 or q.device.type == "cpu",
            "num_warps": 8 if width >= 256 else 4,
            "num_stages": 3,
        }

    def inverse(self) -> tuple[Int[Tensor, " starts"], Int[Tensor, " listings"]]:
        """The blocks of queries that list a block of keys, ascending, one block of keys after the other; and where
        those of each begin, list after list.
        """
        lists, lengths = self.lists
        batch, shared, number, most = lists.shape
        blocks = -(-self.shape[4] // self.shape[6])
        count = torch.arange(most, dtype=torch.int32, device=lists.device)
        shelf = torch.arange(batch * shared, dtype=torch.int32, device=lists.device).view(batch, shared, 1, 1)
        key = (shelf * blocks + lists).masked_fill(count >= lengths[..., None], batch * shared * blocks)
        key, order = key.flatten().sort(stable=True)
        starts = torch.arange(batch * shared * blocks + 1, dtype=torch.int32, device=lists.device)
        return torch.searchsorted(key, starts), (order // most % number).int()


def _every_block(
    batch: int, queries: int, total: int, block_q: int, block_k: int, device: torch.device
) -> tuple[Int[Tensor, "B h Nq K"], Int[Tensor, "B h Nq"]]:
    """The lists of queries that see all up to themselves: as blocks, no more than a number per product of tiles."""
    ends = torch.arange(total - queries, total, block_q, device=device) + block_q
    counts = (ends.clamp(max=total) - 1) // block_k + 1
    every = torch.arange(-(-total // block_k), device=device)
    return every.expand(batch, 1, len(counts), -1), counts.expand(batch, 1, -1)


def _room(device: torch.device) -> int:
    """Bytes for the keys and values of a tile: with queries and gradients, and what is turned, there are three times
    as many.
    """
    if device.type == "cpu":
        return 64 * 1024  # a number like any, where no memory is shared
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)) // 3


def _in_rows(x: Tensor) -> Tensor:
    """Rows in one piece each; other strides may be anything, as projections leave them."""
    return x if x.stride(3) == 1 else x.contiguous()


def _parts(width: int) -> tuple[int, int]:
    """Powers of two that hold a width between them; the second is 0 where it would save nothing."""
    wide = max(_power(width), LEAST)
    rest = max(_power(width - wide // 2), LEAST)
    return (wide // 2, rest) if wide > LEAST and rest < wide // 2 else (wide, 0)


def _power(number: int) -> int:
    """The least power of two from a number on."""
    return 1 << (number - 1).bit_length()
