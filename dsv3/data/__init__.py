"""The data room: from text on this machine to rows of tokens, and the simple models that a trained one must beat.

    corpus     documents of the running Python itself, split by module; their digest
    read       documents of a user's own files
    tokenizer  byte-level BPE
    prepare    corpus -> tokens per split, cached on disk and memory-mapped
    pack       tokens -> training batches with a resumable cursor, and held-out rows
    baseline   unigram, interpolated bigram, lzma, in bits per byte

Nothing is downloaded. Only `pack` imports torch.
"""

from dsv3.data.corpus import Document, corpus_digest

__all__ = ["Document", "corpus_digest"]
