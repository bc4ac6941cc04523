"""Real text that every machine has: the documentation and the source of the running Python.

    prose   the language reference in `pydoc_data.topics`, and the docstrings of the standard library
    code    the standard library's source with those docstrings taken out

Docstrings are read from the source files by `ast`; no module is imported for it. A unit of the split is a module (or a
topic): its docstrings and its code go to the same split, and a docstring that several modules repeat is kept once, so
no text stands in two splits. Tests of the library (many distributions leave them out) and the generated tables of
`encodings` are left out.

The text changes with each Python patch, so every result names its `corpus_digest`.
"""

import ast
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dsv3.data.read import Skipped, read, sources

EXTRACTION = 1  # raise when the way of taking documents from files changes: it is part of the digest
LEFT_OUT = frozenset({"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"})
MACHINE_SPECIFIC = ("config-", "_sysconfigdata")
SPLITS = ("train", "validation", "test")

DocstringOwner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text, the domain it belongs to, and the unit that goes to one split as a whole."""

    domain: str
    unit: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All documents, and the files that could not be read, each with its reason."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def load(paths: tuple[str, ...] = ()) -> Corpus:
    """The documents of `paths`, or of the running Python when there are none.

    Raises:
        ValueError: a path that does not exist, an empty folder, or no readable document at all.
    """
    if paths:
        passages, skipped = read(paths)
        documents = (Document(domain="text", unit=sha256(text.encode()).hexdigest(), text=text) for text in passages)
        return Corpus(documents=tuple(documents), skipped=skipped)
    return _load_python()


def corpus_digest(paths: tuple[str, ...] = ()) -> str:
    """Twelve hexadecimal digits that name the corpus: those of the names and bytes of the files it is taken from."""
    digest = sha256(f"extraction {EXTRACTION}".encode())
    for name, path in _files(paths):
        content = _content(path)
        digest.update(f"\n{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def split(documents: tuple[Document, ...], *, validation: float, test: float) -> dict[str, tuple[Document, ...]]:
    """Documents per split: of the units ranked by the hash of their name, the first are test, the next validation.

    Each of the two takes units until it holds its share of the characters.

    Raises:
        ValueError: fewer than three units, since each split needs one.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.unit] = sizes.get(document.unit, 0) + len(document.text)
    if len(sizes) < len(SPLITS):
        raise ValueError(f"data: {len(sizes)} documents cannot be split in three; give more or longer files")
    ranked = sorted(sizes, key=lambda unit: sha256(unit.encode()).digest())
    total = sum(sizes.values())
    tests = _take(ranked[:-2], sizes, test * total)
    validations = _take(ranked[len(tests) : -1], sizes, validation * total)
    home = dict.fromkeys(ranked, "train") | dict.fromkeys(tests, "test") | dict.fromkeys(validations, "validation")
    return {name: tuple(document for document in documents if home[document.unit] == name) for name in SPLITS}


def separate(source: str) -> tuple[list[str], str]:
    """The docstrings of a module's source, in the order of the text, and the source without them.

    A docstring that shares its line with code stays in the code. A body that was only a docstring keeps `...`.

    Raises:
        SyntaxError: source that this Python cannot parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old library code has invalid escapes; it is read as text, not run
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    docstrings = []
    for node in sorted(_owners(tree), key=lambda node: node.body[0].lineno):
        expression = node.body[0]
        docstring = ast.get_docstring(node)
        if docstring and _fills_its_lines(expression, lines):
            docstrings.append(docstring)
            first, last = expression.lineno - 1, expression.end_lineno or expression.lineno
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            indent = lines[first][: expression.col_offset]
            lines[first:last] = [f"{indent}...\n" if alone else ""] + [""] * (last - first - 1)
    return docstrings, "".join(lines)


def _owners(tree: ast.Module) -> Iterator[DocstringOwner]:
    for node in ast.walk(tree):
        if isinstance(node, DocstringOwner) and node.body and isinstance(node.body[0], ast.Expr):
            yield node


def _fills_its_lines(node: ast.stmt, lines: list[str]) -> bool:
    before = lines[node.lineno - 1].encode()[: node.col_offset]
    after = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset :]
    return not before.strip() and not after.strip()


def _load_python() -> Corpus:
    topics = [Document(domain="prose", unit=f"topic {name}", text=text) for name, text in _topics().items()]
    documents, skipped = topics, []
    seen = {document.text for document in topics}
    for unit, path in _python_files():
        try:
            with tokenize.open(path) as file:
                docstrings, code = separate(file.read())
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            skipped.append(Skipped(path=str(path), reason=f"{type(error).__name__}: {error}"))
            continue
        fresh = [text for text in dict.fromkeys(docstrings) if text not in seen]
        if fresh:
            documents.append(Document(domain="prose", unit=unit, text="\n\n".join(fresh) + "\n"))
        if code.strip() and code not in seen:
            documents.append(Document(domain="code", unit=unit, text=code))
        seen.update([*fresh, code])
    return Corpus(documents=tuple(documents), skipped=tuple(skipped))


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics  # half a megabyte of text that only a cold cache needs

    once = {text: name for name, text in sorted(topics.items(), reverse=True)}  # some topics have two names
    return {name: text for text, name in reversed(once.items())}


def _python_files() -> Iterator[tuple[str, Path]]:
    root = sysconfig.get_path("stdlib")
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if name not in LEFT_OUT and not name.startswith(MACHINE_SPECIFIC))
        package = Path(folder).relative_to(root).parts
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(MACHINE_SPECIFIC):
                parts = package if name == "__init__.py" else (*package, name.removesuffix(".py"))
                yield ".".join(parts), Path(folder, name)


def _files(paths: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    if paths:
        yield from ((path.name, path) for path in sources(paths))
    else:
        yield from _python_files()
        yield "pydoc_data.topics", Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # reading it for its text will say why


def _take(ranked: list[str], sizes: dict[str, int], share: float) -> list[str]:
    taken: list[str] = []
    held = 0
    for unit in ranked:
        if taken and held >= share:
            break
        taken.append(unit)
        held += sizes[unit]
    return taken
