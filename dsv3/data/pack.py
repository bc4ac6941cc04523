"""Packing: documents in a seeded order, end to end, cut in rows of T + 1 tokens of which the last opens the next row.

    stream   epoch 0's documents shuffled by (seed, 0), then epoch 1's shuffled by (seed, 1), ...
    row r    stream[r T : (r + 1) T + 1]: inputs are its first T tokens, targets its last T;
             so every token is predicted exactly once
    batch    the next B rows, after the rows that begin in one epoch were shuffled too

Without the second shuffle a batch would be one piece of one document, and its gradient far from that of the corpus.
Attention may look across the border of two documents in a row, as in DeepSeek-V3 (arXiv 2412.19437 section 4.2). The
cursor is one number, the rows taken so far; it does not depend on how many processes share a batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.config.rules import require
from dsv3.data.prepare import Split

# The purposes of the random streams: another stream of the same seed never moves with them.
DOCUMENTS, ROWS = 0x5041434B, 0x524F5753


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch: its documents, where each ends in the stream, and the rows that begin in it."""

    documents: np.ndarray
    ends: np.ndarray
    rows: np.ndarray


class Batches:
    """An endless sequence of batches `[B, T + 1]` of a split, with a cursor that can be saved and put back."""

    def __init__(self, split: Split, batch_size: int, sequence_length: int, seed: int) -> None:
        require(len(split.tokens) > 0, "split", 0, "must hold at least one token", "give more text")
        self._split = split
        self._batch_size = batch_size
        self._length = sequence_length
        self._seed = seed
        self._taken = 0
        self._epochs: dict[int, _Epoch] = {}

    def next(self) -> Int[Tensor, "B T1"]:
        """The next batch; the cursor moves on by B rows."""
        rows = [self._row(place) for place in range(self._taken, self._taken + self._batch_size)]
        self._taken += self._batch_size
        return torch.from_numpy(np.stack(rows))

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it belongs to."""
        split = {"tokens": len(self._split.tokens), "sequence_length": self._length}
        return {"rows": self._taken, "seed": self._seed, **split}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: a state of other text, of another seed or of another length.
        """
        for name, here in self.state_dict().items():
            rule = f"the saved cursor has {name}={state[name]}"
            same = name == "rows" or state[name] == here
            require(same, name, here, rule, "resume with the same text, seed and length")
        self._taken = state["rows"]

    def _row(self, place: int) -> np.ndarray:
        epoch = place * self._length // len(self._split.tokens)
        row = self._epoch(epoch).rows[place - self._first_row(epoch)]
        return self._read(int(row) * self._length, self._length + 1)

    def _first_row(self, epoch: int) -> int:
        return -(-epoch * len(self._split.tokens) // self._length)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            starts, (first, last) = self._split.starts, (self._first_row(epoch), self._first_row(epoch + 1))
            documents = np.random.default_rng([DOCUMENTS, self._seed, epoch]).permutation(len(starts) - 1)
            self._epochs = {kept: order for kept, order in self._epochs.items() if kept == epoch - 1}
            self._epochs[epoch] = _Epoch(
                documents=documents,
                ends=np.cumsum(starts[documents + 1] - starts[documents]),
                rows=first + np.random.default_rng([ROWS, self._seed, epoch]).permutation(last - first),
            )
        return self._epochs[epoch]

    def _read(self, start: int, count: int) -> np.ndarray:
        total = len(self._split.tokens)
        parts = []
        while count:
            order = self._epoch(start // total)
            part = self._read_in_epoch(order, start % total, min(count, total - start % total))
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _read_in_epoch(self, order: _Epoch, start: int, count: int) -> np.ndarray:
        stream = np.empty(count, dtype=np.int64)
        filled, place = 0, int(np.searchsorted(order.ends, start, side="right"))
        while filled < count:
            end = self._split.starts[order.documents[place] + 1]
            first = end - (order.ends[place] - (start + filled))
            take = min(count - filled, int(end - first))
            stream[filled : filled + take] = self._split.tokens[first : first + take]
            filled, place = filled + take, place + 1
        return stream


def share(batch: Int[Tensor, "B T1"], *, parts: int, rank: int = 0, world: int = 1) -> tuple[Int[Tensor, "b T1"], ...]:
    """The microbatches of one process: of each of `parts` slices of the global batch the `rank`-th of `world` pieces.

    So the p-th microbatches of all processes together are the p-th microbatch of a single process.

    Raises:
        ValueError: a batch that does not divide.
    """
    rule = f"must be a multiple of accumulation_steps={parts} x processes={world}"
    require(len(batch) % (parts * world) == 0, "batch_size", len(batch), rule, "change the batch or the processes")
    return tuple(part.chunk(world)[rank] for part in batch.chunk(parts))


def heldout_rows(split: Split, sequence_length: int, count: int) -> tuple[Int[Tensor, "R T1"], Int[Tensor, " R"]]:
    """At most `count` rows spread evenly over a split in its own order, and the domain that each row begins in.

    Raises:
        ValueError: a split shorter than one row.
    """
    rows = (len(split.tokens) - 1) // sequence_length
    rule = f"is longer than the {len(split.tokens)} tokens of a held-out split"
    require(rows > 0, "train.sequence_length", sequence_length, rule, "shorten the sequences or give more text")
    places = np.arange(min(count, rows)) * rows // min(count, rows) * sequence_length
    columns = places[:, None] + np.arange(sequence_length + 1)
    documents = np.searchsorted(split.starts, places, side="right") - 1
    return torch.from_numpy(split.tokens[columns].astype(np.int64)), torch.from_numpy(split.domains[documents])
