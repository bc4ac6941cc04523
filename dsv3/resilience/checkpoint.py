"""Checkpoints that are whole or absent, whenever the process is killed.

    <directory>/step-00000300/manifest.json     step, and for each part its size and SHA-256
                              <part>.pt         one file per entry of the state: model.pt, optimizer.pt, ...

Everything is written under another name, flushed to the disk, and renamed last; a rename within a folder is atomic
(POSIX), so a reader finds a complete checkpoint or none. What a rename cannot rule out (a disk that lost blocks, a file
cut by hand) the manifest finds: such a checkpoint is refused, with what is missing, and the one before it is used.
Parts are read without running code from them (`weights_only`).
"""

import io
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint on disk; `problem` says what is wrong with it, None if nothing is."""

    step: int
    path: Path
    problem: str | None


def require_writable(directory: str | Path) -> Path:
    """The folder, made if it does not exist, after a file was really written to it.

    Raises:
        ValueError: when that fails; ask before the work starts.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"dsv3")
    except OSError as error:
        raise ValueError(f"out={str(directory)!r}: cannot be written ({error}); choose another folder") from error
    return path


def save(directory: str | Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write the entries of `state` (tensors, numbers, text, and lists and dicts of them) as the checkpoint of `step`.

    Keep the newest `keep`.

    An older checkpoint is deleted only after this one stands. If writing fails, what was there before is as it was.
    """
    assert keep >= 1, "a checkpoint that is not kept need not be written"
    directory = require_writable(directory)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=directory))
    final = directory / f"step-{step:08d}"
    try:
        parts = {f"{name}.pt": _write_part(temporary / f"{name}.pt", value) for name, value in state.items()}
        _write_flushed(temporary / MANIFEST, json.dumps({"step": step, "parts": parts}, indent=2).encode())
        _flush_folder(temporary)
        if final.exists():  # it was refused, or the run went on from an earlier step
            final.rename(Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=directory)) / final.name)
        temporary.rename(final)
        _flush_folder(directory)
    finally:
        for unfinished in directory.glob(f"{UNFINISHED}*"):  # this one if it failed, and those of killed processes
            shutil.rmtree(unfinished)
    for old in _folders(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def load_latest(directory: str | Path, *, parts: tuple[str, ...] | None = None) -> tuple[int, dict[str, Any]]:
    """The step and the state (or only some `parts` of it) of the newest whole checkpoint; tensors come to the CPU.

    Newer ones that are not whole are passed over with a warning that names what is missing.

    Raises:
        ValueError: when there is no whole checkpoint, with what is wrong with each.
    """
    refused: list[str] = []
    for checkpoint in reversed(found(directory)):
        if checkpoint.problem is None:
            for problem in refused:
                warnings.warn(f"{problem}; the checkpoint of step {checkpoint.step} is used instead", stacklevel=2)
            return checkpoint.step, _read_parts(checkpoint.path, parts)
        refused.append(f"checkpoint {checkpoint.path} is refused: {checkpoint.problem}")
    reasons = "; ".join(refused) or "there is none"
    raise ValueError(f"checkpoint={str(directory)!r}: no whole checkpoint ({reasons}); train from the start without it")


def found(directory: str | Path) -> tuple[Found, ...]:
    """All checkpoints in a folder, oldest first, each compared with its manifest."""
    return tuple(Found(step=_step(path), path=path, problem=_problem(path)) for path in _folders(Path(directory)))


def _folders(directory: Path) -> list[Path]:
    folders = [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _problem(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (part["bytes"], part["sha256"]) for name, part in manifest["parts"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({type(error).__name__}: {error})"
    problems = [_part_problem(path / name, *wanted) for name, wanted in expected.items()]
    return ", ".join(problem for problem in problems if problem) or None


def _part_problem(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size} of {size} bytes"
    with path.open("rb") as file:
        changed = sha256(file.read()).hexdigest() != digest
    return f"{path.name} does not have the SHA-256 of its manifest" if changed else None


def _read_parts(path: Path, parts: tuple[str, ...] | None) -> dict[str, Any]:
    names = sorted(file.stem for file in path.glob("*.pt")) if parts is None else parts
    return {name: torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True) for name in names}


def _write_part(path: Path, value: Any) -> dict[str, int | str]:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getbuffer()
    _write_flushed(path, content)
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def _write_flushed(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
