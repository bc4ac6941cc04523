"""A layer of routed experts by itself: every dispatch, the peers of it, and dense layers of as many FLOPs.

All arms get the same tokens, the same routing and the same weights, each in the layout it likes. The routing is given,
so the router's own cost is left out; sorting, combining and the gradients of the gate weights are in. `uniform` routing
draws K distinct experts for each token, `balanced` gives every expert as many rows, `text` is that of real text
(`bench.text_routing`).

    transformers     the experts of DeepSeek-V3 there, on torch's grouped product: the peer
    triton           the experts on a GPU: left out elsewhere
    padded           each expert's rows filled up to those of the fullest, then one batched product
    padded_1.2       the same at the article's capacity: fewer rows to fill up, and tokens dropped that find no room
    padded_128       each expert's rows filled up to a multiple of 128, as MegaBlocks does, then the grouped product
    dense            a SwiGLU of K times the width on all tokens, torch's own products
    dense_kernel     the same by our kernel, as a layer of one expert: what is lost to experts alone

`transformers_compiled` and `dense_compiled` are those two after torch.compile, at one shape each: seconds of compiling,
so they are built only where they are asked for by name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.text_routing import text_routing
from dsv3.config import Fixed, MoE
from dsv3.config.rules import require
from dsv3.layers import SwiGLU
from dsv3.layers.swiglu import swiglu
from dsv3.moe import Routing
from dsv3.moe.capacity import drop, expert_capacity
from dsv3.moe.dispatch import Dispatch, grouped, kernel, looped, padded, reference, sort_rows, triton
from dsv3.moe.kernels import triton_experts
from dsv3.moe.kernels.experts import fits, why_not
from dsv3.moe.memory import ReusedMemory
from dsv3.moe.routing import count

PEER = "transformers"
DENSE = ("dense", "dense_kernel")
TRUTH = "reference"
LIMITED: Mapping[str, str] = {"padded_1.2": TRUTH + "_1.2"}  # arms that drop, and what they are to equal
TRUTHS = (TRUTH, *LIMITED.values())
FACTOR = 1.2
COMPILED = {"transformers_compiled": PEER, "dense_compiled": "dense"}
KERNEL = ("kernel", "dense_kernel")
PADDED = 128  # rows to a multiple of which an expert's are filled up


@dataclass(frozen=True)
class Shape:
    """N tokens of width D to K of E experts of width F."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int

    @property
    def rows(self) -> int:
        """Rows of an average expert."""
        return self.tokens * self.k // self.experts

    @property
    def flops(self) -> int:
        """Of forward and backward: three products of each row, each thrice."""
        return 18 * self.tokens * self.k * self.hidden * self.inner


class Arm:
    """Something with parameters that turns tokens into tokens; `gate` are the weights of each token's experts, where it
    has any, and `transposed` says that it stores outputs first.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        x: Tensor,
        *,
        gate: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        self.forward = forward
        self.parameters = tuple(parameters)
        self.x = x.clone().requires_grad_()
        self.inputs = (self.x,) if gate is None else (self.x, gate)
        self.toward = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        self.transposed = transposed

    def output(self) -> Tensor:
        """Forward alone."""
        return self.forward(self.x)

    def step(self) -> Tensor:
        """Forward and backward, without gradients of an earlier call."""
        for leaf in (*self.inputs, *self.parameters):
            leaf.grad = None
        y = self.output()
        y.backward(self.toward)
        return y

    def results(self) -> list[Tensor]:
        """Output and gradients of tokens, gate and experts' weights, the last with inputs first."""
        y = self.step()
        first, rest = ([leaf.grad for leaf in of if leaf.grad is not None] for of in (self.inputs, self.parameters))
        return [y, *first, *(gradient.transpose(1, 2) if self.transposed else gradient for gradient in rest)]


def blockwise(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """The grouped product over rows filled up to whole blocks with zeros."""
    token, weight, counts = sort_rows(routing)
    whole = -(-counts // PADDED) * PADDED
    ends, filled = whole.cumsum(0), counts.cumsum(0)
    place = torch.arange(len(token), device=x.device) + (ends - whole - filled + counts).repeat_interleave(counts)
    rows = x.new_zeros(int(ends[-1]), x.shape[1]).index_copy(0, place, x[token])
    offsets = ends.to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up, offs=offsets).chunk(2, dim=-1)
    out = F.grouped_mm(swiglu(gate, up), down, offs=offsets)[place] * weight.to(x.dtype)[:, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, out.float()).to(x.dtype)


DISPATCHES: Mapping[str, Dispatch] = {
    "kernel": kernel,
    "triton": triton,
    "looped": looped,
    "grouped": grouped,
    "padded": padded,
    "padded_128": blockwise,
    "padded_1.2": padded,
    TRUTH: reference,
    LIMITED["padded_1.2"]: reference,
}
LENDING = ("kernel", "looped")  # memory, to their gradients


def routing_of(shape: Shape, routed: str, seed: int = 0) -> Routing:
    """Which experts the tokens go to; gate weights are random, but of text the router's.

    Raises:
        ValueError: a way of routing that there is not.
    """
    rule = "must be uniform, balanced or text"
    require(routed in ("uniform", "balanced", "text"), "routed", routed, rule, "choose one of them")
    if routed == "text":
        return text_routing(shape.tokens, _config(shape.experts, shape.k), seed=seed)
    random = torch.Generator().manual_seed(seed)
    if routed == "balanced":
        first = torch.arange(shape.tokens)[:, None] * shape.k + torch.arange(shape.k)
        indices = torch.randperm(shape.experts, generator=random)[first % shape.experts]
    else:
        indices = torch.rand(shape.tokens, shape.experts, generator=random).topk(shape.k).indices
    weights = torch.rand(shape.tokens, shape.k, generator=random)
    return Routing(indices, weights, weights.new_ones(shape.tokens, shape.experts), count(indices, shape.experts))


def limited(routing: Routing) -> Routing:
    """The same with what each expert keeps at the article's capacity."""
    return drop(routing, _config_of(routing), Fixed(factor=FACTOR))


def _config_of(routing: Routing) -> MoE:
    return _config(len(routing.counts), routing.indices.shape[1])


def _config(experts: int, k: int) -> MoE:
    """Of a router, which does not care how wide its experts are."""
    return MoE(n_routed_experts=experts, num_experts_per_tok=k, moe_intermediate_size=1)


def build(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    names: Iterable[str] | None = None,
    routed: str = "uniform",
    seed: int = 0,
    lend: bool = True,
    instructions: str = "",
) -> dict[str, Arm]:
    """The named arms, or all that need no compiling and that this machine has, the peer first.

    `lend`: gradients get their memory back in the next call, as in training. For counting bytes it must not, since
    memory that is kept is not seen to be taken. `instructions`: what our kernel computes with, "" the best.
    """
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.tokens, shape.hidden, generator=random).to(device, dtype)
    given = routing_of(shape, routed, seed)
    routing = Routing(*(part.to(device) for part in (given.indices, given.weights, given.scores, given.counts)))
    gate_up = torch.randn(shape.experts, shape.hidden, 2 * shape.inner, generator=random) / shape.hidden**0.5
    down = torch.randn(shape.experts, shape.inner, shape.hidden, generator=random) / shape.inner**0.5
    gate_up, down = gate_up.to(device, dtype), down.to(device, dtype)
    made: dict[str, Callable[[], Arm]] = {PEER: partial(_peer, shape, routing, gate_up, down, x)}
    made |= {name: partial(_ours, name, routing, gate_up, down, x, lend, instructions) for name in DISPATCHES}
    made |= {name: partial(_dense, name, shape, x, lend) for name in DENSE}
    uncompiled = tuple(made)
    made |= {name: partial(_compiled, made[of]) for name, of in COMPILED.items()}
    missing = set(KERNEL) if why_not() is not None or not fits(x, down) else set()
    if triton_experts.why_not(device.type) is not None:
        missing.add("triton")
    return {name: made[name]() for name in names or uncompiled if name not in missing}


def check(arms: Mapping[str, Arm], dtype: torch.dtype) -> None:
    """Outputs and gradients of every routed arm equal the reference's; the dense layers are another function."""
    truths = {name: arms[name].results() for name in TRUTHS if name in arms}
    for name, arm in arms.items():
        if COMPILED.get(name, name) in (*TRUTHS, *DENSE):
            continue
        for found, right in zip(arm.results(), truths[LIMITED.get(name, TRUTH)], strict=True):
            # Sums of a few hundred products in other orders, and a handful of roundings to the type on the way.
            bound = 8 * torch.finfo(dtype).eps * arm.x.shape[1] ** 0.5 * right.abs().max().item()
            torch.testing.assert_close(found, right, rtol=0.0, atol=bound, msg=partial("{}: {}".format, name))


def _compiled(make: Callable[[], Arm]) -> Arm:
    arm = make()
    arm.forward = torch.compile(arm.forward, fullgraph=True, dynamic=False)
    return arm


def _ours(
    name: str, routing: Routing, gate_up: Tensor, down: Tensor, x: Tensor, lend: bool, instructions: str = ""
) -> Arm:
    stacked = nn.Parameter(gate_up.clone()), nn.Parameter(down.clone())
    given: dict[str, Any] = {"instructions": instructions} if name == "kernel" else {}
    if name in LENDING and lend:
        given["memory"] = (ReusedMemory(), ReusedMemory())
    if name in (*LIMITED, *LIMITED.values()):
        routing = limited(routing)
    if name in LIMITED:
        given["capacity"] = expert_capacity(len(x), _config_of(routing), FACTOR)
    dispatch, routing = partial(DISPATCHES[name], **given), _learning(routing)
    return Arm(lambda rows: dispatch(rows, routing, *stacked), stacked, x, gate=routing.weights)


def _learning(routing: Routing) -> Routing:
    """The same routing, whose weights get a gradient, as a router's do."""
    return replace(routing, weights=routing.weights.clone().requires_grad_())


def _dense(name: str, shape: Shape, x: Tensor, lend: bool) -> Arm:
    wide = shape.k * shape.inner
    if name == "dense":
        layer = SwiGLU(shape.hidden, wide).to(x)
        return Arm(layer, layer.parameters(), x)
    one = Shape(shape.tokens, shape.hidden, wide, 1, 1)
    random = torch.Generator().manual_seed(0)
    gate_up = torch.randn(1, shape.hidden, 2 * wide, generator=random) / shape.hidden**0.5
    down = torch.randn(1, wide, shape.hidden, generator=random) / wide**0.5
    routing = routing_of(one, "balanced")
    routing = Routing(routing.indices, torch.ones_like(routing.weights), routing.scores, routing.counts)
    return _ours("kernel", routing, gate_up.to(x), down.to(x), x, lend)


def _peer(shape: Shape, routing: Routing, gate_up: Tensor, down: Tensor, x: Tensor) -> Arm:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.k,
    )
    config._experts_implementation = "grouped_mm"
    experts = DeepseekV3Experts(config).to(x)
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
        experts.down_proj.copy_(down.transpose(1, 2))
    gate = _learning(routing).weights
    return Arm(
        lambda rows: experts(rows, routing.indices, gate.to(rows)),
        experts.parameters(),
        x,
        gate=gate,
        transposed=True,
    )
