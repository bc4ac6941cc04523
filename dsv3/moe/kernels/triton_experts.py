"""The experts on a GPU as operators that torch knows, `dsv3_triton_experts`: forward and backward in Triton.

The equations are those of `dsv3.moe.looped`, the tiles those of `triton_passes`, which is imported where Triton is. No
token is copied to its experts' rows before a product: products gather as they load (SonicMoE, arXiv 2512.14080). Kept
for backward are x, the pre-activations h and the order of the pairs. A pair's output, and its gradient of x, is written
to a row of its own, and the k rows of a token are then added in float32, in one order. The host asks nothing of the
device, so that kernels queue up; the price is tiles without rows, at most one an expert.

On a CPU the same kernels run in Triton's interpreter, which is how they are tested where there is no GPU. Its bf16
holds numbers but does not multiply them: products are of fp32 there. The sizes of tiles are guesses: they have been
compiled for a GPU, and never been timed on one.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dsv3.config.rules import require

NAME = "dsv3_triton_experts"
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
LEAST = 16  # rows, columns and depth of a product
TILE = {2: 128, 4: 32}  # rows and columns at most, by bytes of a number: larger ones of float32 spill registers
DEPTH = {2: 64, 4: 32}


@torch.compiler.assume_constant_result  # the compiler runs it and keeps the answer
def why_not(device: str) -> str | None:
    """None once the operators exist and run on such a device; otherwise the reason why not."""
    reason = _missing(device)
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

    from dsv3.moe.kernels import triton_passes

    interpreted = not isinstance(triton_passes.hidden, triton.JITFunction)
    if interpreted != (device == "cpu"):
        return "it runs on a GPU, or with TRITON_INTERPRET=1, set before Python starts, interpreted on a CPU"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "it multiplies bf16, which GPUs before 2020 do not"
    return None


def triton_experts(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "N K"],
    gate_up: Float[Tensor, "E D twoF"],
    down: Float[Tensor, "E F D"],
    pair: Int[Tensor, " M"],
    counts: Int[Tensor, " E"],
    *,
    dropping: bool,
) -> Float[Tensor, "N D"]:
    """The routed sum in x's type. `pair` numbers the pairs of a token and an expert in the order of the experts, and
    after those that experts take, `counts` of each, come the others, of which there are none unless `dropping`.

    Raises:
        RuntimeError: where the kernel cannot run.
        ValueError: for another number format.
    """
    reason = why_not(x.device.type)
    if reason is not None:
        raise RuntimeError(f"the Triton kernel of the experts is not at hand: {reason}")
    out: Tensor = torch.ops.dsv3_triton_experts.forward(x, weight, gate_up, down, pair, counts, dropping)[0]
    return out


@functools.cache
def _define() -> None:
    given = "Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor pair, Tensor counts, bool dropping"
    torch.library.define(f"{NAME}::forward", f"({given}) -> (Tensor, Tensor)")
    results = "(Tensor, Tensor, Tensor, Tensor)"
    torch.library.define(f"{NAME}::backward", f"(Tensor dy, Tensor h, {given}, bool[4] wanted) -> {results}")
    torch.library.impl(f"{NAME}::forward", ("cpu", "cuda"), _forward)
    torch.library.impl(f"{NAME}::backward", ("cpu", "cuda"), _backward)
    torch.library.register_fake(f"{NAME}::forward", _results)
    torch.library.register_fake(f"{NAME}::backward", _gradients)
    torch.library.register_autograd(f"{NAME}::forward", _differentiate, setup_context=_keep)
    torch.library.register_autograd(f"{NAME}::backward", _differentiate_twice)
    register_flop_formula(torch.ops.dsv3_triton_experts.forward, get_raw=True)(_forward_flops)
    register_flop_formula(torch.ops.dsv3_triton_experts.backward, get_raw=True)(_backward_flops)


@dataclass(frozen=True)
class _Call:
    """What the passes of a call share: tokens, k, widths, and what rows there are of which expert."""

    tokens: int
    k: int
    hidden: int
    inner: int
    pair: Int[Tensor, " M"]
    counts: Int[Tensor, " E"]
    half: bool
    exact: bool

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, down: Tensor, pair: Tensor, counts: Tensor) -> "_Call":
        kind = str(x.dtype).removeprefix("torch.")
        rule = "must be float32, bfloat16 or float16"
        require(x.dtype in FORMATS, "dtype", kind, rule, "convert x and the experts' weights")
        exact = x.dtype == torch.float32 or x.device.type == "cpu"
        return cls(
            tokens=weight.shape[0],
            k=weight.shape[1],
            hidden=x.shape[1],
            inner=down.shape[1],
            pair=pair.contiguous(),
            counts=counts,
            half=x.element_size() == 2,
            exact=exact,
        )

    def tile(self, rows: int, columns: int, depth: int) -> dict[str, Any]:
        """Sizes that hold so many rows, columns and steps of the sum if they can."""
        size = 2 if self.half else 4
        most = (TILE[size], TILE[size], DEPTH[size])
        wanted = (max(_power(number), LEAST) for number in (rows, columns, depth))
        found = dict(zip(("ROWS", "COLUMNS", "DEPTH"), map(min, most, wanted), strict=True))
        warps = 8 if found["ROWS"] * found["COLUMNS"] >= 128 * 64 else 4
        return found | {"EXACT": self.exact, "num_warps": warps, "num_stages": 3}

    def by_rows(
        self, columns: int, depth: int, *, accumulators: int = 1
    ) -> tuple[tuple[int, int], Tensor, dict[str, Any]]:
        """Programs, triples and sizes of a pass over tiles of rows by tiles of `columns`."""
        rows, experts = len(self.pair), len(self.counts)
        tile = self.tile(-(-rows // experts), columns, depth)
        tile["COLUMNS"] = max(tile["COLUMNS"] // accumulators, LEAST)
        number = min(rows, rows // tile["ROWS"] + experts)
        return (number, -(-columns // tile["COLUMNS"])), self.triples(number, tile["ROWS"]), tile

    def triples(self, number: int, rows: int) -> Int[Tensor, "number 3"]:
        """Of each tile its expert, its first row and where the expert's rows end; some are empty."""
        tiles = (self.counts + rows - 1) // rows
        last, ends = tiles.cumsum(0), self.counts.cumsum(0)
        tile = torch.arange(number, device=self.counts.device)
        expert = torch.searchsorted(last, tile, right=True).clamp(max=len(tiles) - 1)
        first = (ends - self.counts)[expert] + (tile - (last - tiles)[expert]) * rows
        return torch.stack((expert, first, ends[expert]), 1).int()

    def added(self, pairs: Tensor) -> Float[Tensor, "N D"]:
        """The rows of each token's pairs, added in float32."""
        return pairs.view(self.tokens, self.k, self.hidden).sum(1, dtype=torch.float32).to(pairs.dtype)


def _forward(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, pair: Tensor, counts: Tensor, dropping: bool
) -> tuple[Tensor, Tensor]:
    from dsv3.moe.kernels import triton_passes

    call = _Call.of(x, weight, down, pair, counts)
    x, weight, gate_up, down = x.contiguous(), weight.float().contiguous(), gate_up.contiguous(), down.contiguous()
    h, a = _rows_of_pairs(x, len(pair), 2 * call.inner, dropping), x.new_empty(len(pair), call.inner)
    pairs = _rows_of_pairs(x, len(pair), call.hidden, dropping)
    with torch.cuda.device_of(x):
        if len(pair):
            grid, tiles, sizes = call.by_rows(call.inner, call.hidden, accumulators=2)
            triton_passes.hidden[grid](
                x, weight, gate_up, call.pair, tiles, h, a, call.k, call.hidden, call.inner, **sizes
            )
            grid, tiles, sizes = call.by_rows(call.hidden, call.inner)
            triton_passes.spread[grid](a, down, call.pair, tiles, pairs, call.inner, call.hidden, False, **sizes)
        return call.added(pairs), h


def _backward(
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pair: Tensor,
    counts: Tensor,
    dropping: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    call = _Call.of(x, weight, down, pair, counts)
    dy, x, gate_up, down = dy.contiguous(), x.contiguous(), gate_up.contiguous(), down.contiguous()
    with torch.cuda.device_of(x):
        dh, a, dweight = _hidden_grads(call, dy, h, weight, down, wanted)
        nothing = x.new_empty(0)
        return (
            _input_grad(call, dh, gate_up, dropping) if dh is not None and wanted[0] else nothing,
            dweight if wanted[1] else nothing,
            _matrix_grad(call, x, dh, gate_up, "left") if dh is not None and wanted[2] else nothing,
            _matrix_grad(call, a, dy, down, "right") if a is not None else nothing,
        )


def _hidden_grads(
    call: _Call, dy: Tensor, h: Tensor, weight: Tensor, down: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """dh and a, each where a wanted gradient is made of it, and the gradient of the router's weights."""
    from dsv3.moe.kernels import triton_passes

    dh = torch.empty_like(h) if wanted[0] or wanted[2] else None
    a = h.new_empty(len(h), call.inner) if wanted[3] else None
    if not len(h):
        return dh, a, torch.zeros_like(weight)
    grid, tiles, sizes = call.by_rows(call.inner, call.hidden, accumulators=2)
    parts = weight.new_zeros(grid[1], *weight.shape, dtype=torch.float32)
    given = (dy, weight.float().contiguous(), down, h, call.pair, tiles)
    triton_passes.hidden_grads[grid](*given, dh, a, parts, len(h), call.k, call.hidden, call.inner, **sizes)
    return dh, a, parts.sum(0).to(weight.dtype)


def _input_grad(call: _Call, dh: Tensor, gate_up: Tensor, dropping: bool) -> Tensor:
    from dsv3.moe.kernels import triton_passes

    pairs = _rows_of_pairs(gate_up, len(dh), call.hidden, dropping)
    if len(dh):
        grid, tiles, sizes = call.by_rows(call.hidden, 2 * call.inner)
        triton_passes.spread[grid](dh, gate_up, call.pair, tiles, pairs, 2 * call.inner, call.hidden, True, **sizes)
    return call.added(pairs)


def _matrix_grad(call: _Call, left: Tensor, right: Tensor, matrices: Tensor, gathered: str) -> Tensor:
    """The gradient of the experts' `matrices`: zero of those without rows."""
    from dsv3.moe.kernels import triton_passes

    experts, height, width = matrices.shape
    out = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    tile = call.tile(height, width, -(-len(call.pair) // experts))
    grid = (-(-height // tile["ROWS"]), -(-width // tile["COLUMNS"]), experts)
    given = (left, right, call.pair, call.counts, call.counts.cumsum(0), out)
    triton_passes.outer[grid](*given, call.k, height, width, gathered, **tile)
    return out


def _rows_of_pairs(like: Tensor, pairs: int, width: int, dropping: bool) -> Tensor:
    """A row for every pair; zeros where some pair may be dropped and never written."""
    return like.new_zeros(pairs, width) if dropping else like.new_empty(pairs, width)


def _results(x: Tensor, weight: Tensor, gate_up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.numel(), gate_up.shape[2])


def _gradients(dy: Tensor, h: Tensor, *given: Any) -> tuple[Tensor, ...]:
    leaves, wanted = given[:4], given[-1]
    return tuple(
        leaf.new_empty(leaf.shape) if asked else dy.new_empty(0) for leaf, asked in zip(leaves, wanted, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropping = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    found = torch.ops.dsv3_triton_experts.backward(dy, *ctx.saved_tensors, ctx.dropping, wanted)
    return *(grad if asked else None for grad, asked in zip(found, wanted, strict=True)), None, None, None


def _differentiate_twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("the experts on a GPU have no second derivative; dsv3.moe.dispatch.reference has")


def _forward_flops(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *rest: Any, **_: Any) -> int:
    return 6 * int(rest[1].sum()) * down.shape[1] * down.shape[2]


def _backward_flops(dy: Tensor, h: Tensor, *given: Any, **_: Any) -> int:
    """Of the gradient of a, 2 D F a row, and of what else is wanted: 4, 0, 4 and 2."""
    down, counts, wanted = given[3], given[5], given[-1]
    each = 2 + sum(cost for cost, asked in zip((4, 0, 4, 2), wanted, strict=True) if asked)
    return each * int(counts.sum()) * down.shape[1] * down.shape[2]


def _power(number: int) -> int:
    """The least power of two from a number on."""
    return 1 << max(number - 1, 0).bit_length()
