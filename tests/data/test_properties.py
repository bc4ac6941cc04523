"""What holds for any documents.

Packing loses and repeats nothing, a cursor resumes, separated docstrings are gone from the code.
"""

import ast
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import baseline, corpus, pack, read, tokenizer
from dsv3.data.prepare import Split

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=8)
sizes = st.integers(1, 5)


def numbered(lengths: list[int]) -> Split:
    """Documents whose tokens are all different, so that each can be followed."""
    total = sum(lengths)
    return Split(
        tokens=np.arange(total, dtype=np.uint16),
        starts=np.cumsum([0, *lengths]),
        domains=np.zeros(len(lengths), dtype=np.int64),
    )


@given(lengths, sizes, st.integers(0, 5))
def test_every_token_is_an_input_once_in_each_epoch(lengths: list[int], length: int, seed: int) -> None:
    split = numbered(lengths)
    total = len(split.tokens)
    batches = pack.Batches(split, total, length, seed)  # `length` epochs are as many whole rows as there are tokens
    assert torch.bincount(batches.next()[:, :-1].flatten()).tolist() == [length] * total


@given(lengths, sizes, sizes, st.integers(0, 5))
def test_a_row_runs_through_documents_from_their_first_token_to_their_last(
    lengths: list[int], batch_size: int, length: int, seed: int
) -> None:
    split = numbered(lengths)
    first, last = set(split.starts[:-1].tolist()), set((split.starts[1:] - 1).tolist())
    for row in pack.Batches(split, batch_size, length, seed).next().tolist():
        for token, following in pairwise(row):
            assert following == token + 1 if token not in last else following in first


@given(lengths, sizes, sizes)
def test_the_last_target_of_each_row_is_the_first_input_of_another(lengths: list[int], length: int, seed: int) -> None:
    split = numbered(lengths)
    rows = pack.Batches(split, len(split.tokens), length, seed).next()
    counted = [torch.bincount(rows[:, place], minlength=len(split.tokens)) for place in (0, -1)]
    assert (counted[0] - counted[1]).abs().sum() <= 2, "all but the first and the last row of the stream"


@given(lengths, sizes, sizes, st.integers(0, 6), st.integers(0, 3))
def test_a_resumed_cursor_goes_on_as_if_never_stopped(
    lengths: list[int], batch_size: int, length: int, before: int, seed: int
) -> None:
    split = numbered(lengths)
    whole, resumed = (pack.Batches(split, batch_size, length, seed) for _ in range(2))
    for _ in range(before):
        whole.next()
    resumed.load_state_dict(whole.state_dict())
    for _ in range(4):
        assert torch.equal(resumed.next(), whole.next())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_shares_of_all_processes_are_the_batch(parts: int, world: int, each: int) -> None:
    batch = torch.arange(parts * world * each)[:, None]
    shares = [pack.share(batch, parts=parts, rank=rank, world=world) for rank in range(world)]
    joined = [torch.cat([shares[rank][part] for rank in range(world)]) for part in range(parts)]
    assert torch.equal(torch.cat(joined), batch)


@given(lengths, sizes, sizes)
def test_held_out_rows_do_not_overlap(lengths: list[int], length: int, count: int) -> None:
    split = numbered([length + 1, *lengths])
    rows, domains = pack.heldout_rows(split, length, count)
    inputs = rows[:, :-1].flatten()
    assert len(inputs.unique()) == len(inputs)
    assert len(rows) == len(domains) == min(count, (len(split.tokens) - 1) // length)


@given(st.text(), st.integers(1, 20))
def test_the_passages_of_a_text_join_to_it(text: str, size: int) -> None:
    assert "".join(read.cut(text, size)) == text


@settings(max_examples=25)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_is_encoded_to_ids_that_hold_its_bytes(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    trained = tokenizer.train(texts, vocab_size=260)
    pieces = tokenizer.pieces(trained, vocab_size=260)
    encoded = tokenizer.encode(trained, texts)
    assert [b"".join(pieces[token] for token in ids).decode() for ids in encoded] == texts


@given(st.lists(st.integers(0, 6), min_size=2 * baseline.BLOCKS, max_size=300))
def test_the_probabilities_that_follow_a_token_add_up_to_one(tokens: list[int]) -> None:
    bigram = baseline.Bigram.fit(np.asarray([*tokens, 0]), vocab_size=7)
    followed = np.unique(tokens)
    for first in followed:
        rows = np.stack([np.full(7, first), np.arange(7)], axis=1)
        total = sum(np.exp(-bigram.nats(row[None])) for row in rows)
        np.testing.assert_allclose(total, 1.0, rtol=1e-12)  # 7 terms of eps 2e-16


names = st.sampled_from(["f", "g", "Klass"])
docs = st.none() | st.text(alphabet="abc \n.", min_size=1).map(lambda text: f"d{text}")


@st.composite
def modules(draw: st.DrawFn) -> str:
    lines = [f'"""{doc}"""' for doc in [draw(docs)] if doc]
    for _ in range(draw(st.integers(0, 3))):
        lines.append(draw(st.sampled_from(["def {}():", "class {}:"])).format(draw(names)))
        doc = draw(docs)
        lines += [f'    """{doc}"""'] if doc else []
        lines += ["    value = 1"] if doc is None or draw(st.booleans()) else []
    return "\n".join([*lines, ""])


@given(modules())
def test_code_without_its_docstrings_parses_and_has_none(source: str) -> None:
    found, code = corpus.separate(source)
    before = [
        doc
        for node in ast.walk(ast.parse(source))
        if isinstance(node, corpus.DocstringOwner)
        for doc in [ast.get_docstring(node)]
    ]
    assert sorted(found) == sorted(doc for doc in before if doc)
    assert corpus.separate(code) == ([], code)
