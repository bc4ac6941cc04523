"""Linear layers on block-scaled fp8 codes, put into a model from outside by a policy.

    forward   y  = q(x) q(W)^T       x in 1 x 128 tiles (per token), W in 128 x 128 blocks          arXiv 2412.19437
    dgrad     dx = q(dy) q(W)        dy in 1 x 128 tiles                                             section 3.3 and
    wgrad     dW = q'(dy)^T q'(q(x)) both in 128 x 1 tiles, since this product sums over tokens      figure 6

q is quantise, then dequantise. The forward keeps the codes of x for backward, one byte per element, and wgrad turns
them from 1 x 128 into 128 x 1 tiles, so x is rounded twice there, as in the paper (section 3.5.2). Gradients pass the
rounding unchanged (straight through).

Emulated: which numbers are multiplied (codes and scales, bit for bit), and sums in fp32. Not emulated: the speed; the
about 14 bits with which Hopper tensor cores add up inside a block of 128, which is what promotion to fp32 every 128 is
there to bound; E5M6 for the inputs of the linear layer after attention. Codes are multiplied out to fp32 first and the
product is one fp32 matrix product, so its order of summation is the library's; `reference.product` adds block by block,
and a test holds the two together to fp32 rounding.

Kept in high precision (section 3.3.1): embedding, output head, router, norms and the attention core, and what steers a
selection of keys, which is a router by another name, or weighs it against a branch; of DeepSeek-V3.2's indexer that is
the weights of its heads, while its queries and keys are on codes. The published checkpoint keeps `eh_proj` of
multi-token prediction in bf16 too. The absorbed form of latent attention reads the weight of `kv_b_proj` as it is; it
serves decoding.

Stacked weights (experts) are no linear layers. A module that holds some offers an attribute `product`, None or the
matrix product to use in place of torch's, and the policy sets it.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3.config.precision import BFloat16, Float8Block, Float16, Float32, Precision
from dsv3.precision.block_scale import Quantised, Recipes, dequantise, quantise, recipes, round_trip

KEPT = ("lm_head", "embed_tokens", "gate", "eh_proj", "importance", "weights_proj", "gates")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_KN: Tensor, use: Recipes) -> Tensor:
        x, weight = quantise(x_MK, use.activation), quantise(weight_KN, use.weight)
        ctx.save_for_backward(x.codes, x.scale, weight.codes, weight.scale)
        ctx.use, ctx.dtypes = use, (x_MK.dtype, weight_KN.dtype)
        return (dequantise(x) @ dequantise(weight)).to(x_MK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        use, (x_dtype, weight_dtype) = ctx.use, ctx.dtypes
        x_codes, x_scale, weight_codes, weight_scale = ctx.saved_tensors
        dy_MN = gradients[0].float()
        dx_MK = dweight_KN = None
        if ctx.needs_input_grad[0]:
            weight = Quantised(codes=weight_codes, scale=weight_scale, recipe=use.weight)
            dx_MK = (round_trip(dy_MN, use.gradient) @ dequantise(weight).T).to(x_dtype)
        if ctx.needs_input_grad[1]:
            x = dequantise(Quantised(codes=x_codes, scale=x_scale, recipe=use.activation))
            across_tokens = round_trip(x, use.activation.transposed()).T
            dweight_KN = (across_tokens @ round_trip(dy_MN, use.gradient.transposed())).to(weight_dtype)
        return dx_MK, dweight_KN, None


def product(x: Float[Tensor, "*lead K"], weight: Float[Tensor, "K N"], use: Recipes) -> Float[Tensor, "*lead N"]:
    """x @ weight on codes, forward and backward, in x's dtype; tokens are the leading dimensions in order."""
    with torch.autocast(x.device.type, enabled=False):
        y_MN: Tensor = _Product.apply(x.flatten(0, -2), weight, use)
    return y_MN.unflatten(0, x.shape[:-1])


class Float8Linear(nn.Linear):
    """A linear layer that multiplies on codes. It shares the parameters of the layer it replaces."""

    def __init__(self, linear: nn.Linear, use: Recipes) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.use = linear.weight, linear.bias, use
        self.train(linear.training)

    def forward(self, x: Float[Tensor, "*lead K"]) -> Float[Tensor, "*lead N"]:
        """y = q(x) q(W)^T + b, the bias in full precision."""
        y = product(x, self.weight.T, self.use)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a policy covers: modules on codes, linear layers kept, and the share of all matrix parameters on codes."""

    on_codes: tuple[str, ...]
    kept: tuple[str, ...]
    share: float


def apply(model: nn.Module, precision: Precision, *, keep: tuple[str, ...] = KEPT) -> Scope:
    """Put linear layers and experts of `model` on codes where the precision asks for it, in place.

    A module with one of the names in `keep` on its path stays as it is. Parameters stay the same objects with the same
    names, so state dicts and optimizers do not notice. Applying again replaces the recipes.
    """
    match precision:
        case Float32() | BFloat16() | Float16():
            return Scope(on_codes=(), kept=_linears(model), share=0.0)
        case Float8Block():
            return _put_on_codes(model, recipes(precision), keep)
        case _:
            assert_never(precision)


def _linears(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _put_on_codes(model: nn.Module, use: Recipes, keep: tuple[str, ...]) -> Scope:
    chosen, covered = [], 0
    for name, module in list(model.named_modules()):
        if set(name.split(".")) & set(keep):
            continue
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Float8Linear(module, use))
        elif hasattr(module, "product"):
            module.product = partial(product, use=use)
        else:
            continue
        chosen.append(name)
        covered += _matrix_elements(module, recurse=False)
    return Scope(
        on_codes=tuple(chosen),
        kept=tuple(name for name in _linears(model) if name not in chosen),
        share=covered / max(_matrix_elements(model), 1),
    )


def _matrix_elements(module: nn.Module, *, recurse: bool = True) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse) if parameter.dim() >= 2)


def autocast(precision: Precision, device_type: str) -> AbstractContextManager[None]:
    """The context in which a forward pass of this precision runs; fp32 and fp8 switch an outer autocast off."""
    match precision:
        case BFloat16():
            return torch.autocast(device_type, dtype=torch.bfloat16)
        case Float16():
            return torch.autocast(device_type, dtype=torch.float16)
        case Float32() | Float8Block():
            return torch.autocast(device_type, enabled=False)
        case _:
            assert_never(precision)
