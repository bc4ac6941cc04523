"""Byte-level byte-pair encoding: any text is encodable, and decoding restores its bytes.

Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2. Pieces are split by GPT-2's pattern before merging;
DeepSeek's own pattern also cuts numbers in threes, which a vocabulary this small has no room for. Id 0 is the end of a
text. The tokenizer is trained on the training split alone.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3.config.rules import require

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
BYTES = 256


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries; fewer when the texts offer no more pairs to merge.

    Raises:
        ValueError: a vocabulary without room for the bytes and the end of text.
    """
    rule = f"must be above {BYTES}: all bytes and the end of text are entries"
    require(vocab_size > BYTES, "model.vocab_size", vocab_size, rule, "raise it to 512 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(path: Path) -> Tokenizer:
    """The tokenizer that was saved at `path`."""
    return Tokenizer.from_file(str(path))


def pieces(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each id stands for; none for the end of text and for ids that were never assigned."""
    byte_of = {character: byte for byte, character in _alphabet().items()}
    found = [b""] * vocab_size
    for piece, index in tokenizer.get_vocab().items():
        if piece != END_OF_TEXT:
            found[index] = bytes(byte_of[character] for character in piece)
    return found


def _alphabet() -> dict[int, str]:
    """The character that stands for each byte in a vocabulary.

    Itself where it prints, else the next one from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The ids of each text, an end of text after each.

    A text that contains the end-of-text marker keeps it as plain characters.
    """
    unmarked = Tokenizer.from_str(tokenizer.to_str())
    unmarked.encode_special_tokens = True
    encodings = unmarked.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray([*encoding.ids, END_OF_TEXT_ID], dtype=np.int64) for encoding in encodings]
