"""The direction of imports: reports -> ablations -> bench -> dsv3, and in dsv3 a room sees only columns to its left."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSES = ("dsv3", "bench", "ablations", "reports")
COLUMNS = (
    ("config",),
    ("precision", "pipeline", "resilience", "data"),
    ("layers", "augment", "native"),
    ("attention", "moe"),
    ("model",),
    ("parallel",),
    ("train",),
    ("generate",),
)
COLUMN = {room: at for at, rooms in enumerate(COLUMNS) for room in rooms}
WITHOUT_TORCH = (
    "dsv3",
    "dsv3.config",
    "dsv3.config.presets",
    "dsv3.pipeline",
    "dsv3.model.cost",
    "bench.record",
    "bench.metrics",
    "bench.fingerprint",
    "ablations.study",
    "ablations.claims",
    "reports",
    "reports.__main__",
)

IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"{name} imports torch"
"""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The modules of this repository that a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in HOUSES)


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", sources(*HOUSES), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_leftwards(path: Path) -> None:
    house, *rest = path.relative_to(ROOT).with_suffix("").parts
    room = rest[0]
    for name in imported(path):
        target = name.split(".")[0]
        assert HOUSES.index(target) <= HOUSES.index(house), f"{path.name} of {house} imports {name}"
        if house == target == "dsv3" and room in COLUMN and room_of(name) in COLUMN and room_of(name) != room:
            assert COLUMN[room_of(name)] < COLUMN[room], f"dsv3/{room} imports {name}, which is not to its left"


def test_every_room_stands_in_a_column() -> None:
    rooms = {path.stem for path in (ROOT / "dsv3").iterdir() if path.stem[0] not in "_."}
    assert rooms <= COLUMN.keys()


def test_the_torch_free_modules_do_not_import_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
