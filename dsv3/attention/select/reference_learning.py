"""How a choice of blocks learns as defined, in float64 with loops: what `learning` must equal.

`weighed` is a choice that is gated or goes by entmax, `distilled` the loss of one that is distilled. Which blocks are
seen at first is what `reference.content` says. Gradients come by autograd through the same loops.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.attention.select.reference import compared, content
from dsv3.config import Blocks


def weighed(
    choice: Blocks, q: Float[Tensor, "B H S P"], k: Float[Tensor, "B G S P"], *, scale: float
) -> tuple[Callable[[int, int, int], Sequence[int]], Callable[[int, int, int], Tensor]]:
    """The keys that are seen, and what is added to each one's logit, with gradient, by a gated choice or one that goes
    by entmax.
    """
    q, k = q.double(), k.double()
    chosen = content(choice, q, k, scale=scale)

    def of_blocks(sequence: int, head: int, position: int) -> dict[int, Tensor]:
        """The bias of each block that is seen."""
        first = position // choice.block_q * choice.block_q
        complete = first // choice.block_k
        listed = sorted({key // choice.block_k for key in chosen(sequence, head, position)})
        pairs, nothing = compared(choice, q, k, sequence, head, first), q.new_zeros(())
        score = {j: scale * _mean_score(pairs, choice.block_k, j) for j in listed if j < complete}
        if choice.learns == "gated":
            return {j: (2 * score[j].sigmoid()).log() if j in score else nothing for j in listed}
        free = [j for j in score if 0 < j < complete - 1]
        weight = dict(zip(free, entmax([score[j] for j in free]), strict=True))
        kept = [j for j in listed if j not in weight or weight[j].item() > 0]
        return {j: (len(free) * weight[j]).log() if j in weight else nothing for j in kept}

    def seen(sequence: int, head: int, position: int) -> Sequence[int]:
        blocks = of_blocks(sequence, head, position)
        return [key for key in chosen(sequence, head, position) if key // choice.block_k in blocks]

    def bias(sequence: int, head: int, position: int) -> Tensor:
        blocks = of_blocks(sequence, head, position)
        return torch.stack([blocks[key // choice.block_k] for key in seen(sequence, head, position)])

    return seen, bias


def entmax(scores: Sequence[Tensor]) -> list[Tensor]:
    """1.5-entmax: p_j = max(0, z_j - t)^2, z = score / 2, with the t that makes their sum 1; over the best scores, the
    number of which is tried from all of them down.
    """
    z = sorted((score / 2 for score in scores), key=lambda x: -x.item())
    for size in range(len(z), 0, -1):
        best = torch.stack(z[:size])
        spread = (best - best.mean()).square().sum()
        threshold = best.mean() - ((1 - spread) / size).clamp(min=0).sqrt()
        if spread.item() <= 1 and z[size - 1].item() > threshold.item():
            return [(score / 2 - threshold).clamp(min=0).square() for score in scores]
    return []


def distilled(
    choice: Blocks,
    searched: tuple[Float[Tensor, "B H S P"], Float[Tensor, "B G S P"]],
    attended: tuple[Float[Tensor, "B H S W"], Float[Tensor, "B G S W"]],
    *,
    scale: float,
) -> Float[Tensor, ""]:
    """KL of the softmax over the scores of past blocks from attention's mass on them, mean over sequences, lists and
    tokens; mass is averaged over the tokens and heads that share a list.
    """
    (q, k), (batch, heads, total, _) = attended, attended[0].shape
    lists = {"head": heads, "group": k.shape[1], "all": 1}[choice.sharing]
    chosen, share, loss = content(choice, *searched, scale=scale), heads // lists, q.new_zeros(())
    for b, h, first in itertools.product(range(batch), range(lists), range(0, total, choice.block_q)):
        complete = first // choice.block_k
        past = sorted({j for key in chosen(b, h * share, first) if (j := key // choice.block_k) < complete})
        if not past:
            continue
        keys = [j * choice.block_k + i for j in past for i in range(choice.block_k)]
        tokens = range(first, min(first + choice.block_q, total))
        weights = [
            (scale * k[b, head // (heads // k.shape[1]), keys] @ q[b, head, t]).softmax(0)
            for head in range(h * share, (h + 1) * share)
            for t in tokens
        ]
        mass = torch.stack(weights).mean(dim=0).view(-1, choice.block_k).sum(dim=1).detach()
        pairs = compared(choice, *searched, b, h * share, first)
        score = torch.stack([scale * _mean_score(pairs, choice.block_k, j) for j in past])
        loss = loss + len(tokens) * (mass * (mass.log() - score.log_softmax(0))).sum()
    return loss / (batch * lists * total)


def _mean_score(pairs: Sequence[tuple[Tensor, Tensor]], size: int, block: int) -> Tensor:
    """The mean over pairs of a query and keys of q . mean of the block's keys."""
    scores = [q @ k[block * size : (block + 1) * size].mean(dim=0) for q, k in pairs]
    return torch.stack(scores).mean()
