"""The operands of every matrix product of a model, as one forward and backward use them: what quantising would meet.

A linear layer multiplies its input, its weight and, in backward, the gradient of its output. Modules with stacked
weights (experts) are seen through the same attribute `product` by which `dsv3.precision.apply` reaches them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from torch import Tensor, nn

Kind = Literal["activation", "weight", "gradient"]
OnOperand = Callable[[str, Kind, Tensor], None]


@contextmanager
def operands(model: nn.Module, keep: tuple[str, ...], on_operand: OnOperand) -> Iterator[None]:
    """Inside, `on_operand(name, kind, matrix)` hears of each operand of each product, gradients during backward.

    Matrices are detached, [tokens, features] for activations and gradients, [inputs, outputs] for weights. Modules
    with one of the names in `keep` on their path are left out, as the policy leaves them out.
    """
    handles, stacked = [], []
    for name, module in model.named_modules():
        if set(name.split(".")) & set(keep):
            continue
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(partial(_of_linear, name, on_operand)))
        elif hasattr(module, "product"):
            stacked.append((module, module.product))
            module.product = partial(_multiply, name, on_operand)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, before in stacked:
            module.product = before


def _of_linear(name: str, on_operand: OnOperand, module: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> None:
    _report(name, on_operand, inputs[0], module.weight.T, y)


def _multiply(name: str, on_operand: OnOperand, x: Tensor, weight: Tensor) -> Tensor:
    y = x @ weight
    _report(name, on_operand, x, weight, y)
    return y


def _report(name: str, on_operand: OnOperand, x: Tensor, weight: Tensor, y: Tensor) -> None:
    on_operand(name, "activation", x.detach().flatten(0, -2))
    on_operand(name, "weight", weight.detach())
    if y.requires_grad:
        y.register_hook(lambda gradient: on_operand(name, "gradient", gradient.detach().flatten(0, -2)))
