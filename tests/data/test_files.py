"""A user's files: every kind is read, every fault is skipped, counted and named, and nothing at all is an error."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from dsv3.config import Data
from dsv3.data import corpus, prepare, read

TEXTS = ("One text.", "Another\u2028text, one line of JSON.")


def jsonl(texts: tuple[object, ...] = TEXTS) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_parquet(path: Path, column: str = "text", values: tuple[object, ...] = TEXTS) -> None:
    parquet.write_table(pyarrow.table({column: list(values)}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_text("\n\n".join(TEXTS)),
    "a.jsonl": lambda path: path.write_bytes(jsonl()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl()[:7]) + zstandard.compress(jsonl()[7:])),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_its_texts(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    passages, skipped = read.read((str(tmp_path),))
    assert passages == (("\n\n".join(TEXTS),) if name.endswith(".txt") else TEXTS)
    assert skipped == ()


BAD: dict[str, Callable[[Path], object]] = {
    "not-utf8.txt": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "cut.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())[:-9]),
    "damaged.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())[:12] + b"\xff" * 40),
    "not-gzip.jsonl.gz": lambda path: path.write_bytes(jsonl()),
    "cut.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl())[:-9]),
    "not-zstd.jsonl.zst": lambda path: path.write_bytes(jsonl()),
    "cut.parquet": lambda path: (write_parquet(path), path.write_bytes(path.read_bytes()[:-9])),
    "empty.parquet": lambda path: path.write_bytes(b""),
    "other-column.parquet": lambda path: write_parquet(path, column="body"),
    "numbers.parquet": lambda path: write_parquet(path, values=(1, 2)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_skipped_by_name_and_the_others_are_read(tmp_path: Path, name: str) -> None:
    BAD[name](tmp_path / name)
    (tmp_path / "good.txt").write_text("fine")
    passages, skipped = read.read((str(tmp_path),))
    assert passages == ("fine",)
    assert [Path(skip.path).name for skip in skipped] == [name]
    assert skipped[0].reason


@pytest.mark.parametrize("name", BAD)
def test_bad_files_alone_are_an_error_that_says_why(tmp_path: Path, name: str) -> None:
    BAD[name](tmp_path / name)
    with pytest.raises(ValueError, match=f"not one text could be read .*{name}: "):
        read.read((str(tmp_path / name),))


def test_a_bad_line_is_skipped_alone_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n{"text": \n\n[1]\n{"body": "x"}\n"text"\n{"text": 3}\n' + jsonl())
    passages, skipped = read.read((str(path),))
    assert passages == ("first", *TEXTS)
    assert [skip.path.rsplit(":", 1)[1] for skip in skipped] == ["2", "4", "5", "6", "7"]


def test_an_unreadable_file_is_skipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "folder.txt").mkdir()
    passages, skipped = read.read((str(tmp_path),))
    assert passages == ("fine",)
    assert [Path(skip.path).name for skip in skipped] == ["gone.txt", "loop.txt"]
    assert len(corpus.corpus_digest((str(tmp_path),))) == 12


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "notes.md").write_text("x")])
def test_a_folder_without_a_file_of_a_known_kind_is_an_error(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=r"the folder holds no file ending in \.txt"):
        read.sources((str(tmp_path),))


def test_a_missing_path_and_an_unknown_kind_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        read.sources((str(tmp_path / "nothing"),))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match="must end in"):
        read.sources((str(tmp_path / "a.md"),))


def test_texts_that_are_all_blank_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="all texts are empty"):
        read.read((str(tmp_path),))


def book(folder: Path, words: int = 6000) -> Data:
    (folder / "book.txt").write_text("\n\n".join(f"line {index} of a long book" for index in range(words)))
    return Data(paths=(str(folder),), validation=0.1, test=0.1)


def test_a_single_book_is_split_in_three_and_read_from_the_cache_again(tmp_path: Path) -> None:
    data, cache = book(tmp_path), tmp_path / "cache"
    built, again = (prepare.prepare(data, 300, cache=cache) for _ in range(2))
    assert built.folder == again.folder
    assert all(len(split.tokens) > 0 for split in (built.train, built.validation, built.test))
    assert (built.train.tokens == again.train.tokens).all()
    assert [path.name for path in cache.iterdir()] == [built.folder.name]


def test_a_changed_file_or_share_is_another_corpus(tmp_path: Path) -> None:
    data, cache = book(tmp_path), tmp_path / "cache"
    first = prepare.prepare(data, 300, cache=cache)
    other_share = prepare.prepare(Data(paths=data.paths, validation=0.2, test=0.1), 300, cache=cache)
    (tmp_path / "more.txt").write_text("more")
    changed = prepare.prepare(data, 300, cache=cache)
    assert len({first.folder, other_share.folder, changed.folder}) == 3
    assert first.digest == other_share.digest != changed.digest == corpus.corpus_digest(data.paths)


def test_skipped_files_are_still_named_on_a_warm_start(tmp_path: Path) -> None:
    data, cache = book(tmp_path), tmp_path / "cache"
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    names = [[Path(skip.path).name for skip in prepare.prepare(data, 300, cache=cache).skipped] for _ in range(2)]
    assert names == [["bad.txt"], ["bad.txt"]]


def test_a_cache_that_cannot_be_written_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    data = book(tmp_path, words=1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*; set XDG_CACHE_HOME"):
        prepare.prepare(data, 300, cache=tmp_path / "file" / "cache")


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    data, cache = book(tmp_path), tmp_path / "cache"
    with pytest.raises(ValueError, match="vocab_size=10"):
        prepare.prepare(data, 10, cache=cache)
    assert not cache.exists() or list(cache.iterdir()) == []
