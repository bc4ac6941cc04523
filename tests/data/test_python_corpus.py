"""The corpus of the running Python.

Two domains, no text in two splits, the same in every process, and beaten by no trivial model.
"""

import subprocess
import sys

import pytest

from dsv3.config import Data
from dsv3.data import baseline, corpus, pack, prepare


@pytest.fixture(scope="module")
def documents() -> tuple[corpus.Document, ...]:
    return corpus.load().documents


def test_both_domains_hold_real_text(documents: tuple[corpus.Document, ...]) -> None:
    size = {domain: sum(len(d.text) for d in documents if d.domain == domain) for domain in ("prose", "code")}
    assert size["prose"] > 1_000_000
    assert size["code"] > 4_000_000
    assert any("The assert statement" in d.text or "Assert statements" in d.text for d in documents)


def test_no_text_stands_in_two_splits(documents: tuple[corpus.Document, ...]) -> None:
    parts = corpus.split(documents, validation=0.05, test=0.05)
    total = sum(len(d.text) for d in documents)
    seen: dict[str, str] = {}
    for name, part in parts.items():
        share = sum(len(d.text) for d in part) / total
        assert share == pytest.approx(0.9 if name == "train" else 0.05, abs=0.03)
        for text in {d.text for d in part}:
            assert seen.setdefault(text, name) == name


def test_a_module_keeps_its_docstrings_and_its_code_in_one_split(documents: tuple[corpus.Document, ...]) -> None:
    parts = corpus.split(documents, validation=0.05, test=0.05)
    homes = {(d.unit, name) for name, part in parts.items() for d in part}
    assert len(homes) == len({d.unit for d in documents})
    assert {"prose", "code"} == {d.domain for d in documents if d.unit == "argparse"}


def test_the_digest_is_the_same_in_a_fresh_process_that_has_no_torch() -> None:
    code = "import sys; from dsv3.data import corpus_digest; print(corpus_digest()); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == corpus.corpus_digest()
    assert len(corpus.corpus_digest()) == 12


def test_on_python_text_the_bigram_beats_the_unigram_and_both_beat_uniform() -> None:
    prepared = prepare.prepare(Data(), 2048)
    rows, _ = pack.heldout_rows(prepared.validation, 256, 64)
    measured = baseline.baselines(prepared, rows.numpy())
    assert measured == baseline.baselines(prepared, rows.numpy())
    assert 1.0 < measured["bigram"] < measured["unigram"] < 4.0
    assert measured["lzma of the whole split"] < measured["lzma"] < 4.0
