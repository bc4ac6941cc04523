"""The model room: blocks stacked to a Transformer, multi-token prediction, initialisation, analytic cost, Hugging
Face checkpoints.

    Transformer(model)(tokens) -> ModelOutput       cost.parameters(model), cost.flops_per_token(model, length)
    hf.load(directory), hf.save(model, directory)

`cost` and `hf.config` are arithmetic and text and stay importable without torch, so what needs torch is imported when
it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3.model.output import ModelOutput
    from dsv3.model.transformer import Transformer

__all__ = ["ModelOutput", "Transformer"]

_HOME = {"ModelOutput": "output", "Transformer": "transformer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
