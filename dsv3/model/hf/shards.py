"""Tensors in safetensors files: one file `model.safetensors`, or numbered shards and an index that says which tensor
lies where.

Writing puts config and index last, each under its final name only when it is whole, so that a directory whose writing
was cut short does not read as a checkpoint. Reading says what is missing: a file, a tensor, or the end of a file.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.config.rules import require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LISTED = 5


@dataclass(frozen=True)
class Stored:
    """A checkpoint's tensors by name: which file holds each. Nothing is read until `read`."""

    directory: Path
    file_of: dict[str, str]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file so that each file is opened once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of[name], []).append(name)
        for file, wanted in by_file.items():
            with _open(self.directory / file) as tensors:
                for name in wanted:
                    yield name, tensors.get_tensor(name)

    def dtypes(self) -> dict[str, str]:
        """The type of each tensor in safetensors' words (F32, BF16, F8_E4M3), from the headers."""
        found = {}
        for file in sorted(set(self.file_of.values())):
            with _open(self.directory / file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a file handle, not a dictionary)
                    found[name] = tensors.get_slice(name).get_dtype()
        return found


def find(directory: Path) -> Stored:
    """Which tensors the directory holds.

    Raises:
        ValueError: no checkpoint, a shard that is missing or cut short, or a shard that lacks a tensor the index
            places in it.
    """
    index = directory / INDEX
    if index.exists():
        file_of = _read_index(index)
        missing = sorted({file for file in file_of.values() if not (directory / file).exists()})
        _refuse(missing, f"{directory}: shards that {INDEX} names are missing", "copy them again")
    else:
        rule = f"holds neither {SINGLE} nor {INDEX}"
        require((directory / SINGLE).exists(), "directory", str(directory), rule, "name a checkpoint's directory")
        file_of = dict.fromkeys(_names(directory / SINGLE), SINGLE)
    for file in sorted(set(file_of.values())):
        placed = {name for name, at in file_of.items() if at == file}
        absent = sorted(placed - set(_names(directory / file)))
        _refuse(absent, f"{directory / file}: tensors that {INDEX} places here are missing", "copy the shard again")
    return Stored(directory, file_of)


def write(directory: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int) -> None:
    """Write tensors in their order, a new file whenever one would exceed `shard_bytes`; one file only if all fit.

    Raises:
        ValueError: a directory that cannot be written to, or that holds a checkpoint already.
    """
    require(shard_bytes >= 1, "shard_bytes", shard_bytes, "must be at least 1", "5_000_000_000 is usual")
    file_of: dict[str, int] = {}
    total, shards = 0, 0
    for shards, part in enumerate(_parts(tensors, shard_bytes), start=1):
        save_file(part, _partial(directory, shards), metadata={"format": "pt"})
        file_of |= dict.fromkeys(part, shards)
        total += sum(tensor.nbytes for tensor in part.values())
    names = [SINGLE] if shards == 1 else [f"model-{at:05}-of-{shards:05}.safetensors" for at in range(1, shards + 1)]
    for at, name in enumerate(names, start=1):
        os.replace(_partial(directory, at), directory / name)
    if shards > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor: names[at - 1] for tensor, at in sorted(file_of.items())},
        }
        write_text(directory / INDEX, json.dumps(index, indent=2))


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def prepare(directory: Path) -> None:
    """Make the directory, or refuse one that already holds a checkpoint."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"directory={str(directory)!r}: cannot be made ({error}); choose one you may write to"
        ) from error
    held = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors" or path.name == INDEX)
    require(not held, "directory", str(directory), f"already holds {', '.join(held[:LISTED])}", "choose an empty one")
    require(
        os.access(directory, os.W_OK), "directory", str(directory), "is not writable", "choose one you may write to"
    )


def listed(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _parts(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > shard_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _partial(directory: Path, shard: int) -> Path:
    return directory / f"model-{shard:05}.safetensors.partial"


def _read_index(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not an index of shards ({error!r}); copy it again") from error


def _names(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _open(file: Path) -> "safe_open":
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read, cut short or not safetensors ({error}); copy it again") from error


def _refuse(names: list[str], what: str, remedy: str) -> None:
    if names:
        raise ValueError(f"{what}: {listed(names)}; {remedy}")
