"""From corpus to tokens, once: the splits of a corpus as memory-mapped arrays in the user's cache folder.

A prepared corpus is a folder named by a digest of everything it depends on (the corpus, the shares of the splits, the
vocabulary). It is built under another name and renamed when complete, so a reader never sees half of one, and two
processes that build it at once do no harm. A warm start reads the source files for their digest and opens a few arrays;
it needs neither the texts nor the tokenizer.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from dsv3.config.train import Data
from dsv3.data import corpus
from dsv3.data.read import Skipped

LAYOUT = 1  # raise when the files of a prepared corpus change


@dataclass(frozen=True, kw_only=True)
class Split:
    """The documents of one split, one after the other, each closed by an end of text.

    Documents of one domain stand together.
    """

    tokens: np.ndarray  # ids, [tokens]
    starts: np.ndarray  # where each document begins, and the end of the last, [documents + 1]
    domains: np.ndarray  # the index of each document's domain in Prepared.domains, [documents]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A tokenised corpus: its splits, how many bytes each id stands for, and where it came from."""

    digest: str
    folder: Path
    domains: tuple[str, ...]
    bytes_per_token: np.ndarray
    train: Split
    validation: Split
    test: Split
    skipped: tuple[Skipped, ...]


def cache_folder() -> Path:
    """Where prepared corpora are kept: `$XDG_CACHE_HOME/dsv3`, or `~/.cache/dsv3`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3"


def prepare(data: Data, vocab_size: int, *, cache: Path | None = None) -> Prepared:
    """The corpus of `data` as tokens of a vocabulary of `vocab_size`, from the cache or built now (some seconds).

    Raises:
        ValueError: as `corpus.load` and `corpus.split`, or a cache folder that cannot be written.
    """
    cache = cache_folder() if cache is None else cache
    digest = corpus.corpus_digest(data.paths)
    key = f"{LAYOUT} {digest} {data.validation} {data.test} {vocab_size} {data.paths}"
    folder = cache / f"corpus-{sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "manifest.json").exists():
        _build(folder, data, vocab_size, digest)
    return _open(folder)


def _build(folder: Path, data: Data, vocab_size: int, digest: str) -> None:
    from dsv3.data import tokenizer as bpe  # a warm start does without

    loaded = corpus.load(data.paths)
    splits = corpus.split(loaded.documents, validation=data.validation, test=data.test)
    domains = tuple(dict.fromkeys(document.domain for document in loaded.documents))
    tokenizer = bpe.train((document.text for document in splits["train"]), vocab_size)
    temporary = _temporary_beside(folder)
    try:
        tokenizer.save(str(temporary / "tokenizer.json"))
        np.save(temporary / "bytes_per_token.npy", [len(piece) for piece in bpe.pieces(tokenizer, vocab_size)])
        for name, documents in splits.items():
            ordered = sorted(documents, key=lambda document: domains.index(document.domain))
            _write_split(
                temporary / name, ordered, bpe.encode(tokenizer, [d.text for d in ordered]), domains, vocab_size
            )
        manifest = {
            "digest": digest,
            "domains": domains,
            "documents": {name: Counter(d.domain for d in documents) for name, documents in splits.items()},
            "skipped": [[skip.path, skip.reason] for skip in loaded.skipped],
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_beside(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"cache={str(folder.parent)!r}: cannot be written ({error}); set XDG_CACHE_HOME to a folder that can"
        ) from error


def _write_split(
    folder: Path, documents: list[corpus.Document], ids: list[np.ndarray], domains: tuple[str, ...], vocab_size: int
) -> None:
    folder.mkdir()
    narrow = np.uint16 if vocab_size <= 2**16 else np.uint32
    np.save(folder / "tokens.npy", np.concatenate(ids).astype(narrow))
    np.save(folder / "starts.npy", np.cumsum([0, *map(len, ids)]))
    np.save(folder / "domains.npy", np.asarray([domains.index(document.domain) for document in documents]))


def _move(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "manifest.json").exists():  # else another process has just built the same
            raise


def _open(folder: Path) -> Prepared:
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = {
        name: Split(
            tokens=np.load(folder / name / "tokens.npy", mmap_mode="r"),
            starts=np.load(folder / name / "starts.npy"),
            domains=np.load(folder / name / "domains.npy"),
        )
        for name in corpus.SPLITS
    }
    return Prepared(
        digest=manifest["digest"],
        folder=folder,
        domains=tuple(manifest["domains"]),
        bytes_per_token=np.load(folder / "bytes_per_token.npy"),
        skipped=tuple(Skipped(path=path, reason=reason) for path, reason in manifest["skipped"]),
        **splits,
    )
