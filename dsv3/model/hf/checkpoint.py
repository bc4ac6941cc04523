"""A checkpoint's directory to a Transformer, and back.

Reading takes each tensor that the config asks for to its place and refuses everything else: a tensor that is missing,
left over or of another shape is an error that names it. Copies of shared matrices (multi-token prediction stores the
embedding and the head again) must equal what they copy.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.config import Model
from dsv3.config.rules import require
from dsv3.model.hf import shards
from dsv3.model.hf.config import read_config, write_config
from dsv3.model.hf.float8 import CODES, SUFFIX, Float8Weights, check_scale, scale_format
from dsv3.model.hf.names import TIED_HEAD, Entry, entries
from dsv3.model.transformer import Transformer

CONFIG = "config.json"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    CODES: torch.bfloat16,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a directory held: the model, and the codes of its FP8 weights (None when it had none)."""

    model: Transformer
    float8: Float8Weights | None


def load(directory: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a Hugging Face checkpoint; see `read`."""
    return read(directory, dtype=dtype).model


def read(directory: str | Path, *, dtype: torch.dtype | None = None) -> Checkpoint:
    """The model of a checkpoint and the FP8 codes that it may have been stored in.

    Weights get `dtype`, or the widest type that any of them is stored in (bf16 for FP8 codes). A checkpoint whose
    config announces multi-token prediction but that holds no tensor of it, as transformers writes them, becomes a
    model without.

    Raises:
        ValueError: what `read_config` and `shards.find` refuse; tensors that are missing, left over, of a wrong
            shape, or copies that differ.
    """
    directory = Path(directory)
    text = _read_text(directory / CONFIG)
    stored = shards.find(directory)
    config = _without_absent_mtp(read_config(text), stored)
    wanted = list(entries(config))
    types = stored.dtypes()
    coded = [entry.stored for entry in wanted if types.get(entry.stored) == CODES]
    _check_names(wanted, coded, stored)
    float8 = _read_codes(coded, json.loads(text).get("quantization_config"), stored)
    model = _allocate(config, dtype or _widest(types, wanted))
    _fill(model, wanted, stored, float8)
    return Checkpoint(model, float8)


def save(
    model: Transformer,
    directory: str | Path,
    *,
    shard_bytes: int = 5_000_000_000,
    float8: Float8Weights | None = None,
) -> None:
    """Write the model as transformers reads it; `float8` (of `read`) writes the weights that were FP8 codes as FP8
    codes again.

    Raises:
        ValueError: a model that the format cannot describe, or a directory that holds a checkpoint or cannot be
            written to.
    """
    directory = Path(directory)
    plain = write_config(model.config) | {"dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    if float8 is not None:
        plain |= {"quantization_config": float8.config()}
    shards.prepare(directory)
    shards.write(directory, _tensors(model, float8), shard_bytes=shard_bytes)
    shards.write_text(directory / CONFIG, json.dumps(plain, indent=2))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); name a checkpoint's directory") from error


def _without_absent_mtp(config: Model, stored: shards.Stored) -> Model:
    beyond = f"model.layers.{config.num_hidden_layers}."
    present = any(name.startswith(beyond) for name in stored.file_of)
    return config if present or config.mtp is None else replace(config, mtp=None)


def _check_names(wanted: list[Entry], coded: list[str], stored: shards.Stored) -> None:
    held, scales = set(stored.file_of), {name + SUFFIX for name in coded}
    missing = sorted(({entry.stored for entry in wanted if not entry.copy} | scales) - held)
    left_over = sorted(held - {entry.stored for entry in wanted} - scales)
    if missing:
        raise ValueError(
            f"{stored.directory}: tensors are missing: {shards.listed(missing)}; the checkpoint is incomplete"
        )
    if left_over:
        what = f"tensors that the config has no place for: {shards.listed(left_over)}"
        raise ValueError(f"{stored.directory}: {what}; the config belongs to another model")


def _widest(types: dict[str, str], wanted: list[Entry]) -> torch.dtype:
    weights = [entry.stored for entry in wanted if entry.stored in types and not _is_buffer(entry)]
    for name in weights:
        require(types[name] in FLOATS, f"{name} type", types[name], f"must be one of {', '.join(FLOATS)}", "convert it")
    return reduce(torch.promote_types, {FLOATS[types[name]] for name in weights})


def _is_buffer(entry: Entry) -> bool:
    return entry.ours.endswith(("e_score_correction_bias", "largest_load"))


def _read_codes(coded: list[str], quantization: dict[str, Any] | None, stored: shards.Stored) -> Float8Weights | None:
    scale_fmt = scale_format(quantization or {})
    if not coded:
        return None
    if quantization is None:
        raise ValueError(
            f"config.json quantization_config: missing, but {shards.listed(coded)} are stored as FP8 codes"
        )
    scales = {name.removesuffix(SUFFIX): scale for name, scale in stored.read(name + SUFFIX for name in coded)}
    codes = dict(stored.read(coded))
    for name in coded:
        check_scale(name, codes[name], scales[name])
    return Float8Weights(scale_fmt=scale_fmt, codes=codes, scales=scales)


def _allocate(config: Model, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    return model.to(dtype).to_empty(device="cpu")


@torch.no_grad()
def _fill(model: Transformer, wanted: list[Entry], stored: shards.Stored, float8: Float8Weights | None) -> None:
    ours = model.state_dict()
    places = {entry.stored: entry for entry in wanted if entry.stored in stored.file_of}
    coded = set() if float8 is None else set(float8.codes)
    plain = [name for name, entry in places.items() if not entry.copy and name not in coded]
    for name, tensor in stored.read(plain):
        _place(places[name], ours, tensor)
    if float8 is not None:
        for name in float8.codes:
            _place(places[name], ours, float8.weight(name, ours[places[name].ours].dtype))
    copies = [name for name, entry in places.items() if entry.copy]
    for name, tensor in stored.read(copies):
        original = ours[places[name].ours]
        same = torch.equal(tensor.to(original.dtype), original)
        require(
            same, name, tuple(tensor.shape), f"must equal {places[name].ours}, of which it is a copy", "copy it again"
        )


def _place(entry: Entry, ours: dict[str, Tensor], tensor: Tensor) -> None:
    view = entry.view(ours[entry.ours])
    given, expected = tuple(tensor.shape), tuple(view.shape)
    require(given == expected, f"{entry.stored}.shape", given, f"must be {expected} by the config", "check the config")
    view.copy_(tensor)


def _tensors(model: Transformer, float8: Float8Weights | None) -> Iterator[tuple[str, Tensor]]:
    ours = model.state_dict()
    for entry in entries(model.config):
        if entry.copy and entry.stored == TIED_HEAD:
            continue  # transformers does not write a tied head
        # A clone even where the view is whole: safetensors refuses two names for one memory.
        tensor = entry.view(ours[entry.ours].detach()).cpu().contiguous().clone()
        if float8 is not None and entry.stored in float8.codes:
            codes, scale = float8.stored(entry.stored, tensor)
            yield entry.stored, codes
            yield entry.stored + SUFFIX, scale
        else:
            yield entry.stored, tensor
