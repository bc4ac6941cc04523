"""What a trained model has to beat, on the same held-out tokens, in bits per byte of their text.

    unigram   p(b) = (c(b) + 1) / (N + V)
    bigram    p(b | a) = w c(a, b) / c(a) + (1 - w) p(b),   w by how often a was seen (Jelinek and Mercer 1980)
    lzma      8 x compressed bytes / bytes; it knows nothing but the held-out text itself

The weights w are fitted by expectation maximisation on every tenth of a hundred equal blocks of the training tokens,
with counts from the other ninety; then the counts are taken from all training tokens. Everything is counted over tokens
of one tokenizer, and divided by the bytes that those tokens stand for, so a model with another tokenizer can stand in
the same table.
"""

import json
import lzma
import math
import os
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from dsv3.data.prepare import Prepared

BLOCKS, HELD_EVERY = 100, 10
BUCKETS = 64
ITERATIONS = 50
MOST_WEIGHT = 0.999  # a weight of 1 would give an unseen pair no probability at all


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """A sum of negative log likelihoods in nats, over so many bytes of text, in bits per byte."""
    return nats / math.log(2) / text_bytes


@dataclass(frozen=True, kw_only=True)
class Unigram:
    """Frequencies of single tokens, one added to each count."""

    probabilities: np.ndarray  # [V]

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> "Unigram":
        """Count `tokens`."""
        counts = np.bincount(tokens, minlength=vocab_size) + 1.0
        return cls(probabilities=counts / counts.sum())

    def nats(self, rows: np.ndarray) -> float:
        """Negative log likelihood of all tokens of `rows` [R, T + 1] but the first of each."""
        return float(-np.log(self.probabilities[rows[:, 1:]]).sum())


@dataclass(frozen=True, kw_only=True)
class PairCounts:
    """How often each pair of neighbours occurs: a sorted list of the pairs that do."""

    codes: np.ndarray  # first * V + second
    counts: np.ndarray
    firsts: np.ndarray  # occurrences of each token as the first of a pair, [V]

    @classmethod
    def of(cls, tokens: np.ndarray, vocab_size: int) -> "PairCounts":
        """Count the neighbours in `tokens`."""
        codes, counts = np.unique(tokens[:-1].astype(np.int64) * vocab_size + tokens[1:], return_counts=True)
        return cls(codes=codes, counts=counts, firsts=np.bincount(tokens[:-1], minlength=vocab_size))

    def conditional(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """c(first, second) / c(first), and 0 where `first` was never seen."""
        wanted = first.astype(np.int64) * len(self.firsts) + second
        place = np.minimum(np.searchsorted(self.codes, wanted), len(self.codes) - 1)
        found = np.where(self.codes[place] == wanted, self.counts[place], 0)
        return found / np.maximum(self.firsts[first], 1)


@dataclass(frozen=True, kw_only=True)
class Bigram:
    """Pair frequencies interpolated with single frequencies, one weight per power of two of the first token's count."""

    unigram: Unigram
    pairs: PairCounts
    weights: np.ndarray  # by bucket(c(a))

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> "Bigram":
        """Fit the weights on a tenth of `tokens`, then count all of them.

        Raises:
            ValueError: fewer tokens than blocks.
        """
        if len(tokens) < 2 * BLOCKS:
            raise ValueError(f"tokens={len(tokens)}: too few to fit the weights of a bigram; give more text")
        held = np.arange(len(tokens)) * BLOCKS // len(tokens) % HELD_EVERY == HELD_EVERY - 1
        counted = tokens[~held]
        weights = fit_weights(Unigram.fit(counted, vocab_size), PairCounts.of(counted, vocab_size), tokens[held])
        return cls(unigram=Unigram.fit(tokens, vocab_size), pairs=PairCounts.of(tokens, vocab_size), weights=weights)

    def nats(self, rows: np.ndarray) -> float:
        """Negative log likelihood of all tokens of `rows` [R, T + 1] but the first of each, given the token before."""
        first, second = rows[:, :-1].ravel(), rows[:, 1:].ravel()
        weight = self.weights[_bucket(self.pairs.firsts[first])]
        seen = self.pairs.conditional(first, second)
        return float(-np.log(weight * seen + (1 - weight) * self.unigram.probabilities[second]).sum())


def lzma_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `text` as one compressed stream, without a header."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return 8 * len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters)) / len(text)


def fit_weights(unigram: Unigram, pairs: PairCounts, heldout: np.ndarray) -> np.ndarray:
    """The interpolation weight of each bucket of counts that makes `heldout` most likely."""
    first, second = heldout[:-1], heldout[1:]
    bucket = _bucket(pairs.firsts[first])
    seen, alone = pairs.conditional(first, second), unigram.probabilities[second]
    size = np.bincount(bucket, minlength=BUCKETS)
    weights = np.full(BUCKETS, 0.5)
    for _ in range(ITERATIONS):
        by_pair = weights[bucket] * seen
        responsible = by_pair / (by_pair + (1 - weights[bucket]) * alone)
        expected = np.bincount(bucket, responsible, minlength=BUCKETS)
        weights = np.where(size > 0, np.minimum(expected / np.maximum(size, 1), MOST_WEIGHT), weights)
    return weights


def baselines(prepared: Prepared, rows: np.ndarray) -> dict[str, float]:
    """Bits per byte of the unigram, the bigram and lzma on held-out `rows` [R, T + 1]; kept beside the prepared corpus.

    The first two are trained on the whole training split.
    """
    name = f"baselines-{sha256(rows.tobytes()).hexdigest()[:16]}.json"
    kept = prepared.folder / name
    if not kept.exists():
        _write_whole(kept, json.dumps(_measure(prepared, rows), indent=2))
    return dict(json.loads(kept.read_text()))


def _measure(prepared: Prepared, rows: np.ndarray) -> dict[str, float]:
    from dsv3.data import tokenizer as bpe  # the text itself is needed by lzma only

    vocab_size = len(prepared.bytes_per_token)
    pieces = bpe.pieces(bpe.load(prepared.folder / "tokenizer.json"), vocab_size)
    text = b"".join(pieces[token] for token in rows[:, 1:].ravel())
    whole = b"".join(pieces[token] for token in prepared.validation.tokens)
    tokens = np.asarray(prepared.train.tokens)
    unigram, bigram = Unigram.fit(tokens, vocab_size), Bigram.fit(tokens, vocab_size)
    return {
        "unigram": bits_per_byte(unigram.nats(rows), len(text)),
        "bigram": bits_per_byte(bigram.nats(rows), len(text)),
        "lzma": lzma_bits_per_byte(text),
        "lzma of the whole split": lzma_bits_per_byte(whole),
    }


def _write_whole(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _bucket(counts: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, np.frexp(counts.astype(np.float64))[1], 0)
