"""Python source as text that says what it does, for digests: without comments, layout and docstrings, and the same on
every Python that this project runs on.

`ast.dump` writes a tree as its own Python has it. 3.12 gave functions and classes the list `type_params` (and, in its
first releases, f-strings an empty last part); 3.13 leaves empty lists out. The text here is that of 3.11. Code that has
type parameters keeps them: no 3.11 can read it.
"""

import ast
import sys
from pathlib import Path

_EMPTY_LISTS = {"show_empty": True} if sys.version_info >= (3, 13) else {}


def parse(path: Path) -> ast.Module:
    """The file's syntax tree without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def dump(tree: ast.AST) -> str:
    """The tree as text. What 3.11 does not know is taken from its nodes."""
    for node in ast.walk(tree):
        if getattr(node, "type_params", None) == []:
            delattr(node, "type_params")
        if isinstance(node, ast.JoinedStr):
            node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    return ast.dump(tree, **_EMPTY_LISTS)
