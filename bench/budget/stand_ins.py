"""What lets the real model run where there are no values, and what makes it keep less: all put on from outside.

Answers          a number that the host asks for (is any score NaN? which is the largest token?) is 0 or True
StaticExperts    bf16: `dsv3.moe.dispatch.grouped`, as on a GPU; fp32: `dsv3.moe.looped` as one operator, as in a
                 compiled step. Their shapes are static; a capacity drops nothing
recompute        torch's checkpointing around each block
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bench.budget.activations import Policy
from dsv3.config import Model
from dsv3.model import Transformer
from dsv3.model.block import Block
from dsv3.moe import Routing
from dsv3.moe.dispatch import grouped, sort_rows
from dsv3.moe.experts import Experts
from dsv3.moe.looped import compiled_forward

AGAIN = ("q_b_proj", "kv_b_proj", "down_proj", "down")  # products that a selective policy does not keep


def built(model: Model, dtype: torch.dtype) -> Transformer:
    """The model with weights of this type, and experts of static shapes."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a cast afterwards would swap fake tensors, which torch refuses
    try:
        made = Transformer(model)
    finally:
        torch.set_default_dtype(default)
    for name, module in list(made.named_modules()):
        if isinstance(module, Experts):
            made.set_submodule(name, StaticExperts(module))
    return made


class StaticExperts(nn.Module):
    """Experts whose shapes do not hang on the routing: nothing is dropped. They share the layer's parameters."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up, self.down = experts.gate_up, experts.down

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's experts."""
        routing = replace(routing, kept=None)
        if x.dtype == torch.bfloat16:
            return grouped(x, routing, self.gate_up, self.down)
        token, weight, counts = sort_rows(routing)
        return compiled_forward(x, weight.to(x.dtype), self.gate_up, self.down, token, counts)[0].to(x.dtype)


class Answers(TorchDispatchMode):
    """Answers what the host asks of a fake tensor: True for a truth, 0 for a number."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, unless it is a question."""
        if func is torch.ops.aten._local_scalar_dense.default:
            asked = args[0].dtype
            return True if asked == torch.bool else 0.0 if asked.is_floating_point else 0
        return func(*args, **(kwargs or {}))


def recompute(block: Block, policy: Policy) -> None:
    """Let the block keep only what the policy says, from outside."""
    forward = partial(type(block).forward, block)
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "selective":
        again = [weight for name, weight in block.named_parameters() if {*AGAIN} & {*name.split(".")}]
        how["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_products, again))

    def lighter(x: Tensor, *, cache: None = None, documents: None = None, lengths: None = None) -> Any:
        return checkpoint(forward, x, **how)

    block.forward = lighter  # type: ignore[method-assign, assignment]


def _products(again: Sequence[Tensor], context: Any, operator: Any, *args: Any, **rest: Any) -> CheckpointPolicy:
    aten, ours = torch.ops.aten, torch.ops.dsv3
    if operator in (aten._scaled_dot_product_flash_attention_for_cpu.default, ours.looped_experts.default):
        return CheckpointPolicy.MUST_SAVE
    if operator in (aten.mm.default, aten._grouped_mm.default):
        weight = args[1].untyped_storage()._cdata
        if weight not in {parameter.untyped_storage()._cdata for parameter in again}:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
