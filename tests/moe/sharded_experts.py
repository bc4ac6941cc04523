"""The gradient of one batch through a trunk and experts, alone or as one of four processes (`python ... OUT`).

The processes are a grid, data x experts. Along "experts" they divide the experts, to which tokens travel and back;
along "data" they hold the same ones, whose gradients are summed. Each has its own part of the tokens. All have the
trunk and the router, whose gradients are summed over all that share the batch. A layout of two processes is a row or a
column of the grid: the other two do the same beside it.

What rank 0 writes holds, per layout and case, the whole gradient, its norms, and what wrong norms would have been:

    local       of what a rank holds. Each clips by its own in NVIDIA-NeMo/Automodel (issue 3816), all by one that omits
                experts of other ranks in NVIDIA/Megatron-LM (pull request 5916)
    averaged    the mean of those, as in deepspeedai/DeepSpeed (issue 8475)
    repeated    with the experts' part gathered from all ranks, of which several may hold the same
    everything  of all ranks' norms together, in which the trunk too is there as often as there are ranks
"""

import math
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3.config import MoE
from dsv3.moe import MoELayer
from dsv3.moe.isolation import sharded_norm
from dsv3.moe.routing import count
from dsv3.parallel import ALONE, Ranks
from tests.moe.layers import layer_of

PROCESSES, TOKENS, WIDTH, EXPERTS = 4, 24, 16, 4
ORDERS = (2.0, math.inf)
STARVED = {"all have tokens": None, "one has none": 3}


class Layout(NamedTuple):
    """How many processes hold the same experts, and which of them each of those that divide the experts holds."""

    data: int
    owned: tuple[range, ...]


WHOLE, HALVES, ONE_SIDED = (range(4),), (range(2), range(2, 4)), (range(4), range(0))
LAYOUTS = {
    "data 2": Layout(2, WHOLE),
    "experts 2": Layout(1, HALVES),
    "experts 2, one-sided": Layout(1, ONE_SIDED),
    "experts 2 x data 2": Layout(2, HALVES),
    "experts 2 x data 2, one-sided": Layout(2, ONE_SIDED),
}


class Place(NamedTuple):
    """This process among those that share the batch, those that divide the experts, and those that hold the same."""

    everyone: Ranks = ALONE
    experts: Ranks = ALONE
    data: Ranks = ALONE


BY_ITSELF = Place()


def place_in(layout: Layout, everyone: Ranks, grid: DeviceMesh) -> Place:
    """Where this process is when the batch is shared in this layout."""
    if layout.data == 1:
        return Place(everyone=along(grid, "experts"), experts=along(grid, "experts"))
    if len(layout.owned) == 1:
        return Place(everyone=along(grid, "data"), data=along(grid, "data"))
    return Place(everyone, experts=along(grid, "experts"), data=along(grid, "data"))


def along(grid: DeviceMesh, axis: str) -> Ranks:
    group = grid.get_group(axis)
    return Ranks(rank=grid.get_local_rank(axis), world=group.size(), group=group)


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


def gathered(value: Tensor, ranks: Ranks) -> Tensor:
    """A number of each process."""
    each = torch.zeros(ranks.world, dtype=value.dtype)
    each[ranks.rank] = value
    return ranks.sum(each)


def measure(layout: Layout, starved: int | None, place: Place = BY_ITSELF) -> dict[str, Any]:
    """The gradient and its norms; alone every layout is the same."""
    trunk, layer, x, target = parts(starved)
    owned = range(EXPERTS) if place.experts.group is None else layout.owned[place.experts.rank]
    own_rows = rows_of(place.everyone, TOKENS // place.everyone.world)
    y = sharded(trunk(x[own_rows]), layer, owned, place.experts)
    ((y - target[own_rows]).square().sum() / TOKENS).backward()
    experts = {"gate_up": layer.experts.gate_up, "down": layer.experts.down}
    others = {"trunk": trunk.weight, "gate": layer.gate.weight}
    held = {name: place.data.sum(parameter.grad) for name, parameter in experts.items()}
    common = {name: place.everyone.sum(parameter.grad) for name, parameter in others.items()}
    shards = [gradient[list(owned)] for gradient in held.values()]
    return {
        "gradient": {name: place.experts.sum(gradient) for name, gradient in held.items()} | common,
        "norms": {order: norms(shards, list(common.values()), order, place) for order in ORDERS},
        "tokens": count(layer.gate(trunk(x)).indices, EXPERTS).tolist(),
    }


def norms(shards: list[Tensor], common: list[Tensor], order: float, place: Place) -> dict[str, Any]:
    """The norm of the whole gradient, and the wrong ones."""
    right, repeated = (
        sharded_norm(shards, common, order=order, gather=lambda own, among=among: gathered(own, among))
        for among in (place.experts, place.everyone)
    )
    local = gathered(sharded_norm(shards, common, order=order), place.everyone)
    return {
        "right": right.item(),
        "same on all": bool((gathered(right, place.everyone) == right).all()),
        "local": local.tolist(),
        "averaged": local.mean().item(),
        "repeated": repeated.item(),
        "everything": torch.linalg.vector_norm(local, order).item(),
    }


def parts(starved: int | None) -> tuple[nn.Linear, MoELayer, Tensor, Tensor]:
    """A trunk, a layer of experts, tokens and what they should become; expert 2 has the gradient's largest entry."""
    layer = layer_of(MoE(n_routed_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=8), WIDTH)
    layer.experts.down.data.mul_(0.3)
    if starved is not None:
        layer.gate.e_score_correction_bias[starved] = -10.0
    generator = torch.Generator().manual_seed(1)
    trunk = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.normal_(trunk.weight, std=0.5, generator=generator)
    x, target = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    return trunk, layer, x, target


def sharded(x: Tensor, layer: MoELayer, owned: range, experts: Ranks) -> Tensor:
    """The layer's routed output for this process's tokens, by whoever of `experts` has the experts."""
    routing = layer.gate(x)
    if experts.group is None:
        return layer.experts(x, routing)
    indices = Gathered.apply(routing.indices, experts)
    everywhere = replace(
        routing,
        indices=indices,
        weights=Gathered.apply(routing.weights, experts),
        scores=Gathered.apply(routing.scores, experts),
        counts=count(indices, EXPERTS),
        kept=torch.isin(indices, torch.tensor(list(owned), dtype=indices.dtype)),
    )
    y = Summed.apply(layer.experts(Gathered.apply(x, experts), everywhere), experts)
    return y[rows_of(experts, len(x))]


def write(rank: int, meeting: str, out: str) -> None:
    """Measure every layout and case, as one of the processes that meet there."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    here = Ranks(rank=rank, world=PROCESSES, group=distributed.group.WORLD)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    places = {name: place_in(layout, here, grid) for name, layout in LAYOUTS.items()}
    found = {
        name: {case: measure(layout, starved, places[name]) for case, starved in STARVED.items()}
        for name, layout in LAYOUTS.items()
    }
    if here.first:
        torch.save(found, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, as each of four processes that import torch would take seconds more.
    multiprocessing.start_processes(write, (f"{sys.argv[1]}.meeting", sys.argv[1]), PROCESSES, start_method="fork")
