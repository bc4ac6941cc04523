"""A user's own files as passages of text: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet.

Rows of .jsonl and .parquet hold their text under "text".

A file that cannot be read to its end (no permission, a cut archive, bytes that are not UTF-8) is skipped as a whole; a
line of .jsonl that is no JSON object with a text is skipped alone. Every skip carries the path and the reason. A .txt
file is cut into passages of about 8 KB at blank lines, so that one book has parts to learn from and parts to be tested
on.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PASSAGE_CHARACTERS = 8192
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something that was not read, and why."""

    path: str
    reason: str


def sources(paths: tuple[str, ...]) -> tuple[Path, ...]:
    """The files that `paths` name, folders searched to any depth, in the order of their names.

    Raises:
        ValueError: a path that does not exist, a file of an unknown kind, or a folder without any file of a known kind.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        known = ", ".join(SUFFIXES)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and not file.is_dir())
            if not inside:
                raise ValueError(f"data.paths={name!r}: the folder holds no file ending in {known}; put some there")
            found += inside
        elif not path.exists():
            raise ValueError(f"data.paths={name!r}: no such file or folder; check the path")
        elif not path.name.endswith(SUFFIXES):
            raise ValueError(f"data.paths={name!r}: the file must end in {known}; convert or rename it")
        else:
            found.append(path)
    return tuple(dict.fromkeys(found))


def read(paths: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """The passages of all files that `paths` name, and what was skipped.

    Raises:
        ValueError: as `sources`, or when not one passage could be read (with the reasons).
    """
    passages: list[str] = []
    skipped: list[Skipped] = []
    for path in sources(paths):
        try:
            texts, bad_lines = _reader(path)(path)
        except _read_errors(path) as error:
            skipped.append(Skipped(path=str(path), reason=f"{type(error).__name__}: {error}"))
            continue
        passages += [text for text in texts if text.strip()]
        skipped += bad_lines
    if not passages:
        reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in skipped[:5]) or "all texts are empty"
        raise ValueError(f"data.paths={paths!r}: not one text could be read ({reasons}); repair or replace the files")
    return tuple(passages), tuple(skipped)


Reader = Callable[[Path], tuple[list[str], list[Skipped]]]


def _reader(path: Path) -> Reader:
    if path.name.endswith(".txt"):
        return lambda path: (list(cut(path.read_text(encoding="utf-8"))), [])
    if path.name.endswith(".parquet"):
        return lambda path: (_parquet(path), [])
    return lambda path: _jsonl(path, _plain_bytes(path).decode("utf-8"))


def cut(text: str, size: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """The text in passages that join to it.

    Each ends at the first blank line after `size` characters, or line when none follows soon.
    """
    start = 0
    while start < len(text):
        end = _boundary(text, start + size, limit=start + 2 * size)
        yield text[start:end]
        start = end


def _boundary(text: str, at: int, limit: int) -> int:
    for mark in ("\n\n", "\n"):
        found = text.find(mark, at, limit)
        if found >= 0:
            return found + len(mark)
    return min(limit, len(text))


def _plain_bytes(path: Path) -> bytes:
    if path.name.endswith(".gz"):
        return gzip.decompress(path.read_bytes())
    if path.name.endswith(".zst"):
        return _zstd(path.read_bytes())
    return path.read_bytes()


def _zstd(content: bytes) -> bytes:
    import zstandard

    plain = b""
    while content:  # frame by frame, because the stream reader ends a cut frame without an error
        frame = zstandard.ZstdDecompressor().decompressobj()
        plain += frame.decompress(content)
        if not frame.eof:
            raise EOFError("the compressed stream ends before its end marker")
        content = frame.unused_data
    return plain


def _jsonl(path: Path, content: str) -> tuple[list[str], list[Skipped]]:
    texts, skipped = [], []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            skipped.append(Skipped(path=f"{path}:{number}", reason=f'no JSON object with "text" ({error!r})'))
            continue
        if isinstance(text, str):
            texts.append(text)
        else:
            skipped.append(Skipped(path=f"{path}:{number}", reason=f'"text" is a {type(text).__name__}, not a string'))
    return texts, skipped


def _parquet(path: Path) -> list[str]:
    from pyarrow import parquet

    texts = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    kinds = {type(text).__name__ for text in texts} - {"str", "NoneType"}
    if kinds:
        raise ValueError(f'the column "text" holds {", ".join(sorted(kinds))}, not strings')
    return [text for text in texts if text is not None]


def _read_errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises; zstandard has an error of its own, looked up only for its files."""
    general = (OSError, EOFError, ValueError, zlib.error)
    if path.name.endswith(".zst"):
        import zstandard

        return (*general, zstandard.ZstdError)
    return general
