"""What it can mean that experts have separate gradient paths, and what measures each meaning.

    between experts   the output of expert e depends on no other's weights, d y_e / d W_f = 0, and an expert without
                      tokens has a gradient of exactly zero. True of every layer that sends a token to few experts, with
                      no design for it: `cross_expert_jacobian`
    at the router     a balance loss pulls at the weight that the language loss trains too. How hard, and in which
                      direction: `router_agreement`. A selection bias has no gradient and cannot pull
    in clipping       one norm for all parameters lets an expert with a large gradient shrink the steps of the others;
                      with a norm of its own each is clipped alone: `clip_by_expert`
    between layouts   the norm that clips is that of the model's gradient, wherever its experts are: `sharded_norm`

With expert parallelism each rank holds the gradients of its experts, and all hold those of the other parameters. The
p-norm of everything is that of the ranks' norms, of their experts alone, and of the norm of what all hold, once:

    |g|_p = | (|g_experts of rank 1|_p, ..., |g_experts of rank R|_p, |g_replicated|_p) |_p       also for p = infinity

A rank's norm of what it holds is not that: unaveraged it has ranks clip the gradient that all hold by different
factors, and its mean over ranks, like a sum that counts replicated parameters R times, changes with the layout. Data
parallelism alone, as in `dsv3.train`, shards nothing: every rank has the whole gradient, and its norm is the one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.config.rules import require
from dsv3.moe.routing import Routing

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds it to a norm


@dataclass(frozen=True)
class Agreement:
    """Two gradients of one weight: the cosine between them, and the norm of the second over that of the first.

    A gradient of zero has no direction: the cosine is NaN, and the ratio 0, infinite or (of two zeros) NaN.
    """

    cosine: float
    norm_ratio: float


def agreement(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]) -> Agreement:
    """How two gradients stand to each other."""
    one, other = first.detach().double().flatten(), second.detach().double().flatten()
    norms = one.norm(), other.norm()
    return Agreement(cosine=float(one @ other / (norms[0] * norms[1])), norm_ratio=float(norms[1] / norms[0]))


def router_agreement(
    language: Float[Tensor, ""], balance: Float[Tensor, ""], weight: Float[Tensor, "E D"]
) -> Agreement:
    """The gradient of the balance loss at a router's weight, against that of the language loss.

    Keeps the graph, and leaves `weight.grad` as it is. A loss that does not reach the weight has a gradient of zero.
    """
    return agreement(_gradient(language, weight), _gradient(balance, weight))


def cross_expert_jacobian(
    experts: Callable[[Tensor, Routing], Tensor],
    x: Float[Tensor, "N D"],
    routing: Routing,
    weights: Sequence[Float[Tensor, "E ..."]],
) -> Float[Tensor, "E E"]:
    """The largest |d y_e / d W_f| for each two experts e and f, y_e being what e adds to the output.

    One backward pass per expert and number of the output: for layers of a few tokens.
    """
    number = len(routing.counts)
    largest = torch.zeros(number, number, dtype=x.dtype)
    for expert in range(number):
        mine = routing.indices == expert
        y = experts(x, replace(routing, kept=mine if routing.kept is None else mine & routing.kept))
        for value in y.flatten():
            for gradient in torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True):
                largest[expert] = torch.maximum(largest[expert], gradient.abs().flatten(1).amax(dim=1))
    return largest


def expert_norms(gradients: Sequence[Float[Tensor, "E ..."]]) -> Float[Tensor, " E"]:
    """The 2-norm of each expert's gradient, over all the stacked weights it has a part of."""
    rows = [torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(rows), dim=0)


def clip_by_expert(gradients: Sequence[Float[Tensor, "E ..."]], most: float) -> tuple[Tensor, ...]:
    """The gradients of stacked weights, each expert's scaled to a norm of at most `most` by itself.

    Raises:
        ValueError: a norm that is not positive.
    """
    require(most > 0, "most", most, "must be a positive norm", "pass 1.0, as DeepSeek-V3 clips the whole gradient")
    shrink = (most / (expert_norms(gradients) + EPSILON)).clamp(max=1.0)
    return tuple(gradient * shrink.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1)) for gradient in gradients)


def only_rank(own: Float[Tensor, ""]) -> Float[Tensor, " R"]:
    """What all ranks have, where there is one."""
    return own[None]


def sharded_norm(
    shards: Sequence[Tensor | None],
    replicated: Sequence[Tensor | None],
    *,
    order: float = 2.0,
    gather: Callable[[Tensor], Tensor] = only_rank,
) -> Float[Tensor, ""]:
    """The norm of a whole model's gradient, in float64, the same on every rank.

    Args:
        shards: the gradients that this rank alone has; none on a rank without experts. Where several ranks hold the
            same experts, `gather` is over one of each.
        replicated: the gradients that all ranks have equally, after they were summed or averaged. None, the gradient of
            a parameter without any, counts as zero here as there.
        order: 1 or more; `math.inf` for the largest entry.
        gather: from this rank's number to those of all ranks that divide the experts among them.

    Raises:
        ValueError: an order below 1, whose norm would be none.
    """
    require(order >= 1, "order", order, "must be at least 1", "pass 2.0 or math.inf")
    # A rank without experts may hold empty stacks of them, which have no infinity norm.
    own = [gradient for gradient in shards if gradient is not None and gradient.numel()]
    common = [gradient for gradient in replicated if gradient is not None and gradient.numel()]
    device = next((gradient.device for gradient in own + common), torch.device("cpu"))
    parts = gather(_norm(own, order, device)), _norm(common, order, device)[None]
    return torch.linalg.vector_norm(torch.cat(parts), order)


def _gradient(loss: Tensor, weight: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(weight)
    return torch.autograd.grad(loss, weight, retain_graph=True, materialize_grads=True)[0]


def _norm(gradients: list[Tensor], order: float, device: torch.device) -> Tensor:
    none = torch.zeros((), dtype=torch.float64, device=device)
    norms = [torch.linalg.vector_norm(gradient, order, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack([none, *norms]), order)
