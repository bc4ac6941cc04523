"""The folder of a run, checked before any work starts.

    config.json       the run's config            tokenizer.json    what turns its tokens into text
    log.jsonl         a line per step             checkpoints/      the newest whole states

A folder that holds a run is never written over unasked.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.config import Config, to_json
from dsv3.resilience import require_writable


@dataclass(frozen=True)
class Folder:
    """Where the parts of a run lie."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """The log."""
        return self.path / "log.jsonl"

    @property
    def config(self) -> Path:
        """The config as JSON."""
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer."""
        return self.path / "tokenizer.json"


def open_folder(folder: Folder, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Make the folder ready for a run of `config`, new or resumed.

    Raises:
        ValueError: a folder that cannot be written; one that holds a run which is neither to be resumed nor
            overwritten; a run of another config that is to be resumed (with the fields that differ).
    """
    require_writable(folder.path)
    if overwrite:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        folder.log.unlink(missing_ok=True)
    elif folder.config.exists() and resume:
        _check_same(json.loads(folder.config.read_text()), json.loads(to_json(config)))
    elif folder.checkpoints.exists() or folder.log.exists():
        raise ValueError(f"out={str(folder.path)!r}: holds a run; resume it, overwrite it, or choose another folder")
    written = folder.config.with_suffix(".partial")
    written.write_text(to_json(config) + "\n")
    written.replace(folder.config)


def _check_same(saved: Any, asked: Any) -> None:
    different = [
        f"{path} (saved {old}, asked {new})" for path, old, new in _differences(saved, asked, "") if old != new
    ]
    if different:
        raise ValueError(f"resume: the config differs in {'; '.join(different)}; resume with the saved config.json")


def _differences(saved: Any, asked: Any, path: str) -> list[tuple[str, Any, Any]]:
    if not (isinstance(saved, dict) and isinstance(asked, dict)):
        return [(path.removeprefix("."), saved, asked)]
    names = dict.fromkeys([*saved, *asked])
    return [pair for name in names for pair in _differences(saved.get(name), asked.get(name), f"{path}.{name}")]
