"""The precision room: number formats by definition, block scaling, linear layers on codes, loss scaling, and counts.

A model never names a precision. A run reads `config.train.precision` and uses three functions from outside:

    scope = apply(model, precision)                 once: linear layers on fp8 codes, where the precision asks for it
    with autocast(precision, device_type): ...      each forward pass
    state = initial(precision)                      loss scaling, None for most; it is a value:
    reason = unscale(gradients, state)                  after backward of loss * state.scale; skip the step unless None
    state = update(state, reason)                       after the step
"""

from dsv3.precision.block_scale import Quantised, Recipe, Recipes, dequantise, quantise, recipes, round_trip
from dsv3.precision.counts import Counts, count
from dsv3.precision.formats import BF16, E4M3, E5M2, FORMATS, FP16, FP32, Format, cast, named, overflows, round_exact
from dsv3.precision.linear import Float8Linear, Scope, apply, autocast, product
from dsv3.precision.loss_scale import LossScale, Reason, initial, unscale, update

__all__ = [
    "BF16",
    "E4M3",
    "E5M2",
    "FORMATS",
    "FP16",
    "FP32",
    "Counts",
    "Float8Linear",
    "Format",
    "LossScale",
    "Quantised",
    "Reason",
    "Recipe",
    "Recipes",
    "Scope",
    "apply",
    "autocast",
    "cast",
    "count",
    "dequantise",
    "initial",
    "named",
    "overflows",
    "product",
    "quantise",
    "recipes",
    "round_exact",
    "round_trip",
    "unscale",
    "update",
]
