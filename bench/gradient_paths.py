"""Training whose gradients take paths of their own, and what those paths carry.

    language    loss -> output of an expert -> its gate weight -> router     cut where the weights of a routing are
    balance     balance loss -> scores -> router, and the layers below       cut where the scores of a routing are
    clipping    one norm for the whole gradient, or one for each expert and one for everything else

Nothing of a model or of its training step is changed for it: a hook on each gate hands on a routing with one part
detached, and a hook on the optimizer clips once the step's own clipping is done, whose norm must then be out of reach.

Two batches of two domains give each expert four gradients. Their cosines within a domain are the ceiling of those
between domains: a gradient of a few tokens is mostly noise, and noise agrees with nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config import MoE
from dsv3.config.rules import require
from dsv3.data.pack import heldout_rows
from dsv3.data.prepare import Split
from dsv3.moe import MoELayer, Routing, balance_losses
from dsv3.moe.isolation import Agreement, clip_by_expert, expert_norms, router_agreement
from dsv3.parallel import ALONE
from dsv3.train import TrainState, train_step
from dsv3.train.loss import cross_entropy, loss_parts
from dsv3.train.step import StepReport

Path = Literal["language", "balance"]


@dataclass(frozen=True, kw_only=True)
class Paths:
    """How the gradients of a training are kept apart.

    detached    the loss whose gradient does not reach the routers
    experts     the norm to which each expert is clipped by itself, and `others` that of all other parameters together;
                None leaves clipping to the step
    """

    detached: Path | None = None
    experts: float | None = None
    others: float = 1.0


def step(state: TrainState, rows: Int[Tensor, "B T1"], paths: Paths) -> tuple[StepReport, float]:
    """A training step on these paths, and the share of the experts with a gradient whose gradient was clipped."""
    shares = list[float]()
    with ExitStack() as stack:
        stack.enter_context(detached(state, paths.detached))
        if paths.experts is not None:
            own = partial(_clip_apart, state, paths.experts, paths.others, shares)
            stack.callback(state.optimizer.register_step_pre_hook(own).remove)
        report = train_step(state, rows)
    if paths.experts is None:
        shares.append(float(report.grad_norm > state.config.train.clip_grad_norm))
    return report, sum(shares) / max(len(shares), 1)


@contextmanager
def detached(state: TrainState, path: Path | None) -> Iterator[None]:
    """Inside, that loss does not reach the routers of the model; with None all do."""

    def cut(gate: torch.nn.Module, inputs: tuple[Any, ...], routing: Routing) -> Routing:
        if path == "language":
            return replace(routing, weights=routing.weights.detach())
        return replace(routing, scores=routing.scores.detach())

    with ExitStack() as stack:
        for layer in state.expert_layers if path is not None else ():
            stack.callback(layer.gate.register_forward_hook(cut).remove)
        yield


def domain_batches(split: Split, *, length: int, rows: int) -> Int[Tensor, "domains 2 R T1"]:
    """Two batches of so many rows of each domain, evenly spread over its text and taken from it in turns.

    Raises:
        ValueError: a domain that has fewer rows.
    """
    every, domains = heldout_rows(split, length, len(split.tokens))
    batches = []
    for domain in range(int(domains.max()) + 1):
        there = (domains == domain).nonzero().flatten()
        rule = f"must be at most half of the {len(there)} rows of a domain"
        require(2 * rows <= len(there), "rows", rows, rule, "ask for fewer")
        batches.append(every[there[torch.arange(2 * rows) * len(there) // (2 * rows)]].view(rows, 2, -1))
    return torch.stack(batches).transpose(1, 2)


def router_agreements(state: TrainState, rows: Int[Tensor, "B T1"], moe: MoE) -> list[Agreement]:
    """By layer: how the gradient of the balance losses of `moe`, which need not be those of the training, stands to the
    gradient of the language loss at the router.
    """
    output = state.model(rows[:, :-1], mtp=False)
    language = cross_entropy(output.logits, rows[:, 1:])
    losses = [loss for routing in output.routing for loss in balance_losses(routing, moe, len(rows)).values()]
    balance = torch.stack(losses).sum()
    layers = state.expert_layers[: len(output.routing)]
    return [router_agreement(language, balance, layer.gate.weight) for layer in layers]


def expert_gradients(state: TrainState, rows: Int[Tensor, "B T1"], path: Path | None) -> Float[Tensor, "LE n"]:
    """What the whole loss gives to each expert of each layer, one row an expert."""
    weights = [weight for layer in state.expert_layers for weight in _weights(layer)]
    with detached(state, path):
        output = state.model(rows[:, :-1], mtp=state.config.train.mtp_loss_weight > 0)
    loss = loss_parts(output, rows, state.config, ALONE.mean)["total"]
    found = [gradient.flatten(1) for gradient in torch.autograd.grad(loss, weights)]
    return torch.cat([torch.cat(pair, dim=1) for pair in zip(found[::2], found[1::2], strict=True)])


def cosines(gradients: Sequence[Sequence[Float[Tensor, "LE n"]]]) -> tuple[Float[Tensor, " e"], Float[Tensor, " e"]]:
    """By expert that all batches reach: the mean cosine between batches of one domain, and between those of two.

    `gradients` are those of two batches of each of two domains.
    """
    (a, b), (c, d) = gradients
    reached = torch.stack([gradient.norm(dim=1) for gradient in (a, b, c, d)]).amin(dim=0) > 0

    def mean(*pairs: tuple[Tensor, Tensor]) -> Tensor:
        each = [torch.einsum("en,en->e", one, other) / (one.norm(dim=1) * other.norm(dim=1)) for one, other in pairs]
        return torch.stack(each).mean(dim=0)[reached]

    return mean((a, b), (c, d)), mean((a, c), (a, d), (b, c), (b, d))


def _clip_apart(state: TrainState, experts: float, others: float, shares: list[float], *_: Any) -> None:
    """Clip the gradients that the optimizer is about to use; what share of experts was clipped is added to `shares`."""
    apart, norms = set[int](), list[Tensor]()
    for layer in state.expert_layers:
        weights = _weights(layer)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norms.append(expert_norms(gradients))
        for gradient, clipped in zip(gradients, clip_by_expert(gradients, experts), strict=True):
            gradient.copy_(clipped)
        apart |= {id(weight) for weight in weights}
    torch.nn.utils.clip_grad_norm_([one for one in state.model.parameters() if id(one) not in apart], others)
    every = torch.cat(norms)
    shares.append(((every > experts).sum() / (every > 0).sum().clamp(min=1)).item())


def _weights(layer: MoELayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.experts.gate_up, layer.experts.down
