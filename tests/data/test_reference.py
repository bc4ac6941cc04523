"""Small cases worked by hand: docstrings and code apart, rows of a stream, a bigram."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from dsv3.data import baseline, corpus, pack, prepare, read, tokenizer

SOURCE = '''"""Module."""
import os


class A:
    """Of A."""

    def f(self):
        """Of f,
        in two lines."""

    def g(self): "shares its line"


def h():
    """Of h."""
    return "not a docstring"
'''


def split_of(*documents: list[int]) -> prepare.Split:
    starts = np.cumsum([0, *map(len, documents)])
    return prepare.Split(
        tokens=np.concatenate(documents).astype(np.uint16), starts=starts, domains=np.arange(len(documents)) % 2
    )


def test_docstrings_leave_the_code_in_the_order_of_the_text() -> None:
    docstrings, code = corpus.separate(SOURCE)
    assert docstrings == ["Module.", "Of A.", "Of f,\nin two lines.", "Of h."]
    assert code == (
        "import os\n\n\nclass A:\n\n    def f(self):\n        ...\n\n"
        '    def g(self): "shares its line"\n\n\ndef h():\n    return "not a docstring"\n'
    )


def test_units_go_to_a_split_as_a_whole_until_its_share_is_held() -> None:
    documents = tuple(
        corpus.Document(domain=domain, unit=f"m{index}", text="x" * 10)
        for index in range(20)
        for domain in ("prose", "code")
    )
    parts = corpus.split(documents, validation=0.1, test=0.05)
    assert {name: len(part) for name, part in parts.items()} == {"train": 34, "validation": 4, "test": 2}
    units = [{document.unit for document in part} for part in parts.values()]
    assert sum(map(len, units)) == len(set.union(*units)) == 20


def test_two_units_cannot_be_split_in_three() -> None:
    documents = tuple(corpus.Document(domain="text", unit=str(index), text="x") for index in range(2))
    with pytest.raises(ValueError, match="2 documents cannot be split in three"):
        corpus.split(documents, validation=0.05, test=0.05)


def test_a_text_is_cut_at_the_first_blank_line_after_the_size() -> None:
    assert list(read.cut("aaaa\n\nbb\ncc\n\ndddddddddddd", size=5)) == ["aaaa\n\n", "bb\ncc\n\n", "dddddddddd", "dd"]


def test_a_row_opens_with_the_last_token_of_another_and_the_last_row_goes_on_in_the_next_epoch() -> None:
    batches = pack.Batches(split_of(list(range(10))), batch_size=4, sequence_length=3, seed=0)
    assert sorted(batches.next().tolist()) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 0, 1, 2]]
    assert sorted(batches.next()[:3].tolist()) == [[2, 3, 4, 5], [5, 6, 7, 8], [8, 9, 0, 1]]


def test_a_batch_mixes_rows_from_all_over_the_corpus() -> None:
    split = split_of(*[[document] * 100 for document in range(50)])
    batches = pack.Batches(split, batch_size=16, sequence_length=10, seed=0)
    assert len(batches.next()[:, 0].unique()) > 10


def test_each_epoch_shuffles_the_documents_anew() -> None:
    documents = [[index] for index in range(40)]
    batches = pack.Batches(split_of(*documents), batch_size=1, sequence_length=40, seed=3)
    first, second = batches.next()[0, :40].tolist(), batches.next()[0, :40].tolist()
    assert first != second
    assert sorted(first) == sorted(second) == list(range(40))


def test_the_share_of_a_process_is_its_piece_of_each_microbatch() -> None:
    batch = torch.arange(8)[:, None]
    assert [part.flatten().tolist() for part in pack.share(batch, parts=2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [part.flatten().tolist() for part in pack.share(batch, parts=2, rank=1, world=2)] == [[2, 3], [6, 7]]
    with pytest.raises(ValueError, match="batch_size=8: must be a multiple of accumulation_steps=3 x processes=1"):
        pack.share(batch, parts=3)


def test_held_out_rows_are_spread_over_the_split_with_their_domain() -> None:
    rows, domains = pack.heldout_rows(split_of(list(range(7)), list(range(7, 13))), sequence_length=2, count=3)
    assert rows.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert domains.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"train\.sequence_length=13: is longer than the 13 tokens"):
        pack.heldout_rows(split_of(list(range(13))), sequence_length=13, count=1)


def test_unigram_adds_one_to_each_count() -> None:
    unigram = baseline.Unigram.fit(np.array([0, 0, 1]), vocab_size=3)
    assert_allclose(unigram.probabilities, [3 / 6, 2 / 6, 1 / 6])
    assert unigram.nats(np.array([[0, 1, 2]])) == pytest.approx(-math.log(2 / 6) - math.log(1 / 6))


def test_bigram_interpolates_pair_and_single_frequencies() -> None:
    tokens = np.array([0, 1, 0, 1, 0, 2])
    unigram, pairs = baseline.Unigram.fit(tokens, 3), baseline.PairCounts.of(tokens, 3)
    weights = np.full(baseline.BUCKETS, 0.75)
    bigram = baseline.Bigram(unigram=unigram, pairs=pairs, weights=weights)
    # pairs 01 01 02 from three 0s, 10 10 from two 1s; singles (3+1, 2+1, 1+1) of 9
    expected = -math.log(0.75 * 2 / 3 + 0.25 * 3 / 9) - math.log(0.75 * 0 + 0.25 * 2 / 9)
    assert bigram.nats(np.array([[0, 1, 2]])) == pytest.approx(expected)


def test_the_fitted_weight_is_the_most_likely_one() -> None:
    # after a 0 always comes a 1 in the counts; in the held-out text 0 is followed by 1 three times of four
    counted, heldout = np.tile([0, 1], 50), np.array([0, 1, 0, 1, 0, 1, 0, 2, 0])
    unigram, pairs = baseline.Unigram.fit(counted, 3), baseline.PairCounts.of(counted, 3)
    weights = baseline.fit_weights(unigram, pairs, heldout)
    bucket = int(np.frexp(50)[1])

    def nats(weight: float) -> float:
        single = unigram.probabilities
        after_0 = 3 * math.log(weight + (1 - weight) * single[1]) + math.log((1 - weight) * single[2])
        after_1 = 3 * math.log(weight * 49 / 49 + (1 - weight) * single[0])
        return -(after_0 + after_1)

    grid = np.linspace(0.01, 0.99, 99)
    assert weights[bucket] == pytest.approx(grid[np.argmin([nats(weight) for weight in grid])], abs=0.011)


def test_bits_per_byte_of_one_bit_per_byte() -> None:
    assert baseline.bits_per_byte(8 * math.log(2), 8) == pytest.approx(1.0)


def test_lzma_is_near_eight_bits_on_noise_and_near_zero_on_repetition() -> None:
    noise = np.random.default_rng(0).bytes(20_000)
    assert 7.9 < baseline.lzma_bits_per_byte(noise) < 8.1
    assert baseline.lzma_bits_per_byte(b"ab" * 10_000) < 0.1


def test_the_bytes_of_the_pieces_of_a_text_join_to_it() -> None:
    texts = ["naïve 数据 \x00\x7f\n\tdef f(): ...", "<|endoftext|> is plain text here"]
    trained = tokenizer.train(texts * 4, vocab_size=300)
    pieces = tokenizer.pieces(trained, vocab_size=300)
    for text, ids in zip(texts, tokenizer.encode(trained, texts), strict=True):
        assert b"".join(pieces[token] for token in ids) == text.encode()
        assert ids[-1] == tokenizer.END_OF_TEXT_ID
        assert tokenizer.END_OF_TEXT_ID not in ids[:-1]


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=256: must be above 256"):
        tokenizer.train(["a"], vocab_size=256)
