"""What code a result depends on: a digest of the source that a function reaches, without running it.

Two scales. Of the function's own file, only what the function uses, name by name: a new figure or a reworded question
leaves the cells of a study valid. Of every module that those parts import from this repository, and the modules that
these import in turn, the whole file, with the kernels (C++, CUDA) that lie beside them and the table that a module
reads (`peaks.toml` beside `peaks.py`). A study outside this repository may have modules of its own beside it: those
that it imports count likewise, a package whole. Python is compared as syntax trees without docstrings: comments and
layout are free to change.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from bench.syntax import dump, parse

ROOT = Path(__file__).resolve().parent.parent
_HOUSES = ("dsv3", "bench", "ablations", "reports")
_MEASURING = (
    "dsv3",
    "bench",
    "ablations.balance_methods",
    "ablations.capacity_cells",
    "ablations.tuning",
)  # of ablations what is trained and what trains; the rest says what is asked
_KERNELS = (".cpp", ".cu", ".h")
_TABLE = ".toml"
_DISPATCH = Path("dsv3", "moe", "dispatch.py")


def code_digest(function: Callable[..., Any]) -> str:
    """Twelve hexadecimal digits that name the code which `function` reaches: in its own file, in dsv3 and in bench, and
    in the modules beside its file.
    """
    folder, files = _source(function).parent, code_files(function)
    named = {path.relative_to(ROOT if path.is_relative_to(ROOT) else folder).as_posix(): path for path in files}
    parts = [dump(node) for node in definitions_reached(function)]
    parts += [f"{name}:{_content(named[name])}" for name in sorted(named)]
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


def code_files(function: Callable[..., Any]) -> frozenset[Path]:
    """The files, other than its own, that `function` reaches."""
    names = frozenset(name for node in definitions_reached(function) for name in _imported(node))
    return files_reached(names, _source(function).parent)


def experts_reached(*functions: Callable[..., Any]) -> dict[str, str] | None:
    """Which dispatch the experts take here, `dsv3.moe.dispatch.chosen_here()`, where one of the functions reaches any;
    None, and no import of torch, where none does.
    """
    if not any(ROOT / _DISPATCH in code_files(function) for function in functions):
        return None
    from dsv3.moe.dispatch import chosen_here

    return chosen_here()


def definitions_reached(function: Callable[..., Any]) -> list[ast.stmt]:
    """The top-level statements of the function's file that define the names it uses, directly or through each other."""
    body = parse(_source(function)).body
    wanted, reached = {function.__name__}, set[int]()
    while True:
        new = [at for at, node in enumerate(body) if at not in reached and _defined(node) & wanted]
        if not new:
            return [body[at] for at in sorted(reached)]
        reached.update(new)
        wanted |= {part.id for at in new for part in ast.walk(body[at]) if isinstance(part, ast.Name)}


def _source(function: Callable[..., Any]) -> Path:
    source = inspect.getsourcefile(function)
    assert source is not None, f"{function!r} has no source file"
    return Path(source).resolve()


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
    """The modules that a piece of code may import; `from a import b` names both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


@cache
def files_reached(modules: frozenset[str], folder: Path | None = None) -> frozenset[Path]:
    """The files of the modules, of all that they import in turn from dsv3, bench and a study's folder, and the kernels
    and tables beside them.
    """
    found: set[Path] = set()
    pending = [path for name in modules for path in _files(name, folder)]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        found.update(beside for beside in path.parent.iterdir() if beside.suffix in _KERNELS)
        found.update(table for table in (path.with_suffix(_TABLE),) if table.is_file())
        pending += _imported_files(path, folder)
    return frozenset(found)


@cache
def _imported_files(path: Path, folder: Path | None) -> tuple[Path, ...]:
    return tuple(file for name in _imported(_tree(path)) for file in _files(name, folder))


def _files(module: str, folder: Path | None) -> Iterator[Path]:
    """The files that importing a module runs: of this repository its own and the __init__ of every package above it,
    where it measures; of the study's folder a module or a whole package.
    """
    parts = module.split(".")
    if _within(module, _MEASURING):
        for depth in range(1, len(parts) + 1):
            base = ROOT.joinpath(*parts[:depth])
            yield from (path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file())
    elif folder is not None and not _within(module, _HOUSES):
        yield from (path for path in (folder / f"{parts[0]}.py",) if path.is_file())
        yield from (folder / parts[0]).rglob("*.py")


def _within(module: str, rooms: tuple[str, ...]) -> bool:
    return f"{module}.".startswith(tuple(f"{room}." for room in rooms))


@cache
def _tree(path: Path) -> ast.Module:
    return parse(path)


@cache
def _content(path: Path) -> str:
    return dump(_tree(path)) if path.suffix == ".py" else path.read_text(encoding="utf-8")
