"""Packing: documents in a seeded order, end to end, cut in rows of T + 1 tokens of which the last opens the next row.

    stream   epoch 0's documents shuffled by (seed, 0), then epoch 1's shuffled by (seed, 1), ...
    row r    stream[r T : (r + 1) T + 1]: inputs are its first T tokens, targets its last T;
             so every token is predicted exactly once

Attention may look across the border of two documents in a row, as in DeepSeek-V3 (arXiv 2412.19437 section 4.2). The
cursor is one number, the tokens consumed so far; it does not depend on how many processes share a batch.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.config.rules import require
from dsv3.data.prepare import Split

SHUFFLE = (
    0x5041434B  # the purpose of this random stream ("PACK"), so that no other stream of the same seed moves with it
)


class Batches:
    """An endless sequence of batches `[B, T + 1]` of a split, with a cursor that can be saved and put back."""

    def __init__(self, split: Split, batch_size: int, sequence_length: int, seed: int) -> None:
        self._split = split
        self._batch_size = batch_size
        self._length = sequence_length
        self._seed = seed
        self._position = 0
        self._epoch = -1
        self._order = self._ends = np.zeros(0, dtype=np.int64)
        require(len(split.tokens) > 0, "split", 0, "must hold at least one token", "give more text")

    def next(self) -> Int[Tensor, "B T1"]:
        """The next batch; the cursor moves on by B x T tokens."""
        fresh = self._batch_size * self._length
        stream = torch.from_numpy(self._read(self._position, fresh + 1))
        self._position += fresh
        return stream.unfold(0, self._length + 1, self._length).contiguous()

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it belongs to."""
        return {"position": self._position, "seed": self._seed, "tokens": len(self._split.tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: a state of other text or of another seed.
        """
        here = self.state_dict()
        for name, remedy in (("tokens", "resume with the data it was trained on"), ("seed", "resume with that seed")):
            require(state[name] == here[name], name, here[name], f"the saved cursor has {name}={state[name]}", remedy)
        self._position = state["position"]

    def _read(self, start: int, count: int) -> np.ndarray:
        total = len(self._split.tokens)
        parts = []
        while count:
            self._enter(start // total)
            part = self._read_in_epoch(start % total, min(count, total - start % total))
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            starts = self._split.starts
            self._order = np.random.default_rng([SHUFFLE, self._seed, epoch]).permutation(len(starts) - 1)
            self._ends = np.cumsum(starts[self._order + 1] - starts[self._order])
            self._epoch = epoch

    def _read_in_epoch(self, start: int, count: int) -> np.ndarray:
        stream = np.empty(count, dtype=np.int64)
        filled, place = 0, int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            document = self._order[place]
            end = self._split.starts[document + 1]
            first = end - (self._ends[place] - (start + filled))
            take = min(count - filled, int(end - first))
            stream[filled : filled + take] = self._split.tokens[first : first + take]
            filled, place = filled + take, place + 1
        return stream


def share(batch: Int[Tensor, "B T1"], *, parts: int, rank: int = 0, world: int = 1) -> tuple[Int[Tensor, "b T1"], ...]:
    """The microbatches of one process.

    `parts` equal slices of the global batch, and of each slice the `rank`-th of `world` equal pieces.

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
