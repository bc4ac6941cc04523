"""What code a result depends on: a digest of the source that a function reaches, without running it.

Two scales. Of the function's own file, only what the function uses, name by name: a new figure or a reworded question
leaves the cells of a study valid. Of every module that those parts import from this repository, and the modules that
these import in turn, the whole file, with the kernels (C++, CUDA) that lie beside them. Python is compared as syntax
trees without docstrings: comments and layout are free to change.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_MEASURING = ("dsv3", "bench", "ablations.tuning")  # of ablations what trains; the rest says what is asked
_KERNELS = (".cpp", ".cu", ".h")


def code_digest(function: Callable[..., Any]) -> str:
    """Twelve hexadecimal digits that name the code which `function` reaches: in its own file, in dsv3 and in bench."""
    own = definitions_reached(function)
    parts = [ast.dump(node) for node in own]
    files = sorted(files_reached(frozenset(name for node in own for name in _imported(node))))
    parts += [f"{path.relative_to(ROOT)}:{_content(path)}" for path in files]
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


def definitions_reached(function: Callable[..., Any]) -> list[ast.stmt]:
    """The top-level statements of the function's file that define the names it uses, directly or through each other."""
    source = inspect.getsourcefile(function)
    assert source is not None, f"{function!r} has no source file"
    body = _without_docstrings(ast.parse(Path(source).read_text())).body
    wanted, reached = {function.__name__}, set[int]()
    while True:
        new = [at for at, node in enumerate(body) if at not in reached and _defined(node) & wanted]
        if not new:
            return [body[at] for at in sorted(reached)]
        reached.update(new)
        wanted |= {part.id for at in new for part in ast.walk(body[at]) if isinstance(part, ast.Name)}


def _defined(node: ast.AST) -> set[str]:
    """The names that a statement binds around it; those of functions, lambdas and comprehensions are their own."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {(alias.asname or alias.name).split(".")[0] for alias in names}
        case ast.Name(id=name, ctx=ast.Store()):
            return {name}
        case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            return set()
        case _:
            return {name for part in ast.iter_child_nodes(node) for name in _defined(part)}


def _imported(tree: ast.AST) -> Iterator[str]:
    """The modules of the measuring houses that a piece of code may import; `from a import b` names both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if f"{name}.".startswith(tuple(f"{room}." for room in _MEASURING)))


@cache
def files_reached(modules: frozenset[str]) -> frozenset[Path]:
    """The files of the modules, of all that they import from dsv3 and bench in turn, and the kernels beside them."""
    found: set[Path] = set()
    pending = [path for name in modules for path in _files(name)]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        found.update(beside for beside in path.parent.iterdir() if beside.suffix in _KERNELS)
        pending += [file for name in _imported(_tree(path)) for file in _files(name)]
    return frozenset(found)


def _files(module: str) -> Iterator[Path]:
    """The file of a module, and the __init__ of every package above it, which its import runs too."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:depth])
        yield from (path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file())


@cache
def _tree(path: Path) -> ast.Module:
    return _without_docstrings(ast.parse(path.read_text()))


def _content(path: Path) -> str:
    return path.read_text() if path.suffix in _KERNELS else ast.dump(_tree(path))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree
