"""Hugging Face checkpoints of `deepseek_v3` type: config.json and safetensors, as transformers reads and writes them.

    load(directory) -> Transformer                      save(model, directory)
    read(directory) -> Checkpoint(model, float8)        save(model, directory, float8=checkpoint.float8)

The second pair keeps FP8 codes: what nobody changed is written back bit by bit.
"""

from dsv3.model.hf.checkpoint import Checkpoint, load, read, save
from dsv3.model.hf.config import read_config, write_config
from dsv3.model.hf.float8 import Float8Weights
from dsv3.model.hf.names import Entry, entries

__all__ = ["Checkpoint", "Entry", "Float8Weights", "entries", "load", "read", "read_config", "save", "write_config"]
