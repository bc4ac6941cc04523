"""Hugging Face checkpoints of `deepseek_v3` and `deepseek_v32` type: config.json and safetensors, as transformers reads
and writes them.

    load(directory) -> Transformer                      save(model, directory)
    read(directory) -> Checkpoint(model, float8)        save(model, directory, float8=checkpoint.float8)

The second pair keeps FP8 codes: what nobody changed is written back bit by bit.

`config` is text and stays importable without torch, so what needs torch is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsv3.model.hf.config import read_config, write_config

if TYPE_CHECKING:
    from dsv3.model.hf.checkpoint import Checkpoint, load, read, save
    from dsv3.model.hf.float8 import Float8Weights
    from dsv3.model.hf.names import Entry, entries

__all__ = ["Checkpoint", "Entry", "Float8Weights", "entries", "load", "read", "read_config", "save", "write_config"]

_HOME = {"Checkpoint": "checkpoint", "load": "checkpoint", "read": "checkpoint", "save": "checkpoint"}
_HOME |= {"Float8Weights": "float8", "Entry": "names", "entries": "names"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
