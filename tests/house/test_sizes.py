"""A function fits on a screen, a file is read in one sitting, and a name says what stands behind it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("dsv3", "bench", "ablations", "reports", "tests")
FILES = sorted([*(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "noxfile.py"])
LONGEST_FUNCTION = 60
LONGEST_FILE = 400
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "manager", "misc", "common"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    if "kernels" in path.parts:
        pytest.skip("a kernel is as long as its loop")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.end_lineno - node.lineno + 1
            assert body <= LONGEST_FUNCTION, f"{path.name}:{node.lineno} {node.name} has {body} lines"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_longer_than_a_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", [path for path in FILES if "tests" not in path.parts], ids=name)
def test_every_file_opens_with_what_a_colleague_would_say(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "a module docstring says the idea"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_name_says_nothing(path: Path) -> None:
    assert not SAYS_NOTHING & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
