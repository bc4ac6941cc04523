"""A checkpoint changed on the disk, as one that was copied badly or made elsewhere."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
