"""FLOPs and bytes handed to collectives, operator by operator, of fake tensors or real ones.

FLOPs are the model's: a causal query counts the keys that it sees, values count at their own width, and scores that a
backward kernel computes again do not count (conventions of `dsv3.model.cost`). A forward that a recomputation policy
runs again does. For matrix products torch's formulas count what an operator is given; the fused attention does not say
how much of its square it computes, so it is counted by the model's own causal formula, and in that part arithmetic and
trace agree by construction. A test holds the formula against torch's count of the masked square.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from bench.meters.flops import formulas
from dsv3.config import Grouped, Latent, Model, MultiHead
from dsv3.model.cost import BACKWARD_OVER_FORWARD


class Counted(TorchDispatchMode):
    """Adds up FLOPs by formula, and bytes handed to collectives.

    torch's own counter also follows modules, and keeps tensors of a recomputed block alive while it does: the peak of
    the step would not be the step's.
    """

    def __init__(self, more: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()
        self.flops = self.handed = 0
        self._formulas = flop_registry | {
            name: shape_wrapper(given) for name, given in (formulas() | dict(more)).items()
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count it."""
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.handed += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        if func._overloadpacket in self._formulas:
            self.flops += int(self._formulas[func._overloadpacket](*args, **(kwargs or {}), out_val=result))
        return result


def attention_formulas(model: Model) -> dict[Any, Callable[..., int]]:
    """FLOPs of the fused attention as the model needs them: causal, values at their own width, nothing twice."""
    match model.attention:
        case Latent() as latent:
            both = latent.qk_head_dim + latent.v_head_dim
        case MultiHead() | Grouped() as plain:
            both = 2 * plain.head_dim

    def forward(q: Sequence[int], *_: Any, **__: Any) -> int:
        batch, heads, length = q[:3]
        return 2 * batch * heads * both * (length * (length + 1) // 2)

    def backward(gradient: Sequence[int], *_: Any, **__: Any) -> int:
        return BACKWARD_OVER_FORWARD * forward(gradient)

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    } | loop_formulas()


def loop_formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of the experts' loop as one operator: each row times both of an expert's matrices."""

    def forward(
        x: Sequence[int], weight: Sequence[int], gate_up: Sequence[int], down: Sequence[int], *_: Any, **__: Any
    ) -> int:
        return 2 * weight[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])

    def backward(dy: Sequence[int], h: Sequence[int], *rest: Any, **__: Any) -> int:
        return BACKWARD_OVER_FORWARD * forward(*rest)

    ours = torch.ops.dsv3
    return {ours.looped_experts: forward, ours.looped_experts_backward: backward}
