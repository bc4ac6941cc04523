"""The gradient of one batch through a trunk and experts, alone or as one of two processes (`torchrun ... OUT`).

    data       each process has half of the tokens and all experts: every gradient is summed, none is sharded
    even       each has half of the tokens and half of the experts: tokens travel to the experts and back
    one_sided  the first has all experts, the second none

What rank 0 writes holds, per layout and case, the norms, the whole gradient, and what two wrong norms would have been.
"""

import math
import os
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.config import MoE
from dsv3.moe import MoELayer
from dsv3.moe.isolation import sharded_norm
from dsv3.moe.routing import count
from dsv3.parallel import ALONE, Ranks, joined
from tests.moe.layers import layer_of

TOKENS, WIDTH, EXPERTS = 24, 16, 4
LAYOUTS = {"data": None, "even": (range(2), range(2, 4)), "one_sided": (range(4), range(0))}
STARVED = {"all have tokens": None, "one has none": 3}


class Gathered(torch.autograd.Function):
    """The rows of all processes, from each process's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, len(own)
        whole = own.new_zeros(ranks.world * len(own), *own.shape[1:])
        whole[rows_of(ranks, len(own))] = own
        return ranks.sum(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient)[rows_of(ctx.ranks, ctx.rows)], None


class Summed(torch.autograd.Function):
    """The sum over processes, each of which uses a part of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(own).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient), None


def rows_of(ranks: Ranks, rows: int) -> slice:
    return slice(ranks.rank * rows, (ranks.rank + 1) * rows)


def measure(layout: str, starved: int | None, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The gradient and its norms in this layout; alone every layout is the same."""
    trunk, layer, x, target = parts(starved)
    by_rank = LAYOUTS[layout]
    owned = None if by_rank is None or ranks.group is None else by_rank[ranks.rank]
    own_rows = rows_of(ranks, TOKENS // ranks.world)
    y = sharded(trunk(x[own_rows]), layer, owned, ranks)
    ((y - target[own_rows]).square().sum() / TOKENS).backward()
    experts = {"gate_up": layer.experts.gate_up, "down": layer.experts.down}
    others = {"trunk": trunk.weight, "gate": layer.gate.weight}
    own = {name: parameter.grad for name, parameter in experts.items()}
    common = {name: ranks.sum(parameter.grad) for name, parameter in others.items()}
    whole = {name: ranks.sum(gradient) for name, gradient in own.items()} | common
    if owned is None:
        shards, replicated = [], list(whole.values())
    else:
        shards, replicated = [gradient[list(owned)] for gradient in own.values()], list(common.values())

    def gather(value: Tensor) -> Tensor:
        place = torch.zeros(ranks.world, dtype=value.dtype)
        place[ranks.rank] = value
        return ranks.sum(place)

    norms = {order: sharded_norm(shards, replicated, order=order, gather=gather) for order in (2.0, math.inf)}
    local = gather(torch.stack([gradient.double().norm() for gradient in shards + replicated]).norm())
    return {
        "gradient": whole,
        "norms": {order: norm.item() for order, norm in norms.items()},
        "same on all": bool((gather(norms[2.0]) == norms[2.0]).all()),
        "local": local.tolist(),
        "averaged": local.mean().item(),
        "counted per rank": local.norm().item(),
        "tokens": count(layer.gate(trunk(x)).indices, EXPERTS).tolist(),
    }


def parts(starved: int | None) -> tuple[nn.Linear, MoELayer, Tensor, Tensor]:
    """A trunk, a layer of experts, tokens and what they should become."""
    layer = layer_of(MoE(n_routed_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=8), WIDTH)
    if starved is not None:
        layer.gate.e_score_correction_bias[starved] = -10.0
    generator = torch.Generator().manual_seed(1)
    trunk = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.normal_(trunk.weight, std=0.5, generator=generator)
    x, target = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    return trunk, layer, x, target


def sharded(x: Tensor, layer: MoELayer, owned: range | None, ranks: Ranks) -> Tensor:
    """The layer's routed output for this process's tokens, by whoever has the experts; by itself without `owned`."""
    routing = layer.gate(x)
    if owned is None:
        return layer.experts(x, routing)
    indices = Gathered.apply(routing.indices, ranks)
    everywhere = replace(
        routing,
        indices=indices,
        weights=Gathered.apply(routing.weights, ranks),
        scores=Gathered.apply(routing.scores, ranks),
        counts=count(indices, EXPERTS),
        kept=torch.isin(indices, torch.tensor(list(owned), dtype=indices.dtype)),
    )
    y = Summed.apply(layer.experts(Gathered.apply(x, ranks), everywhere), ranks)
    return y[rows_of(ranks, len(x))]


def write(out: str) -> None:
    """Measure every layout and case."""
    with joined(os.environ, torch.device("cpu")) as here:
        found = {
            layout: {case: measure(layout, starved, here) for case, starved in STARVED.items()} for layout in LAYOUTS
        }
        if here.first:
            torch.save(found, out)


if __name__ == "__main__":
    # In a function, so that the process group goes with its last name and waits for its threads. One that were still
    # letting go of the last tensor as Python ends would abort the process.
    write(sys.argv[1])
