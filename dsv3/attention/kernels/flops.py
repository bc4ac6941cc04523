"""FLOPs of the kernels, told to torch's flop counter: 2 m n k for each product, over the pairs that are let through.

    forward     scores and their product with the values            2 * pairs * (P + R)
    backward    scores again, and the four products of gradients    2 * pairs * (3 P + 2 R)
    choose      scores of a query and a node of V numbers           2 * scores * V

Pairs are those of the selection's definition, which is what `dsv3.model.cost` counts. The kernels multiply whole
tiles, with pairs on the diagonal that no query sees, and the one in Triton always, the one in C++ where threads
outnumber heads, computes scores and the slope of softmax twice in backward: neither counts, so that the figure is the
model's and the same on every machine.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dsv3.attention.selection import Selection, SelectionCost
from dsv3.attention.sparse import pairs


def register(operators: Any) -> None:
    """Have every FlopCounterMode count a kernel's operators."""
    register_flop_formula(operators.forward, get_raw=True)(_forward)
    register_flop_formula(operators.backward, get_raw=True)(_backward)


def register_choice(operator: Any) -> None:
    """The same of an operator that chooses."""
    register_flop_formula(operator, get_raw=True)(_choose)


def _forward(q: Tensor, k: Tensor, v: Tensor, *selected: Any, **_: Any) -> int:
    return 2 * _pairs(q, k, *selected) * (q.shape[3] + v.shape[3])


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *selected: Any, **_: Any) -> int:
    return 2 * _pairs(q, k, *selected) * (3 * q.shape[3] + 2 * v.shape[3])


def _choose(query: Tensor, nodes: Sequence[Tensor], *_: Any, out_val: tuple[Tensor, Tensor, Tensor, int]) -> int:
    return 2 * out_val[3] * nodes[0].shape[3]


def _pairs(
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    weights: Tensor | None,
    rank: Tensor | None,
    limit: Tensor | None,
    *rest: object,
) -> int:
    (batch, heads, queries, _), total = q.shape, k.shape[2]
    if indices is None or counts is None:
        return batch * heads * (queries * (total - queries) + queries * (queries + 1) // 2)
    cost = SelectionCost(scored=0, kept=0)
    lists = Selection(
        indices=indices, counts=counts, block_q=block_q, block_k=block_k, cost=cost, rank=rank, limit=limit
    )
    return pairs(q, lists, total)
