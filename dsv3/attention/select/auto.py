"""Everything where dense attention is faster, a tree's blocks where they are: the crossover of a committed table.

    the query at position t sees   every key up to its own            t < crossover
                                   its own blocks down the tree       otherwise

The query's own position decides, not how long the sequence is: so later tokens move nothing, prefill equals decoding,
and what the queries before the crossover cost is bounded by it. While no query is behind it attention is dense, by
torch's kernel; after that one Selection lists all blocks for the first queries and the chosen ones for the others.

`auto.toml` has, per instruction set of the C++ kernel, number format and direction, the length from which on the
tree is faster than torch's dense attention, as `python -m bench.crossover` has measured it on trees of 16 blocks of 64
keys. Elsewhere (another processor, no kernel) the crossover is `UNMEASURED`, where even the tree in plain PyTorch was
several times as fast on a CPU; for a GPU it is a guess. It is a number in the config: a model keeps its function on
another machine.
"""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch

from dsv3.attention.kernels import blocks
from dsv3.config import Auto, Hierarchical

TABLE = Path(__file__).with_name("auto.toml")
UNMEASURED = 16384  # tokens
Direction = Literal["forward", "training"]


def auto(tree: Hierarchical, dtype: torch.dtype, direction: Direction) -> Auto:
    """`tree` behind the crossover of this processor for that format and direction, rounded up to whole blocks."""
    assert not isinstance(tree, Auto), "it has a crossover already"
    best = blocks.instruction_sets()[0] if blocks.why_not() is None else None
    asked = (best, str(dtype).removeprefix("torch."), direction)
    found = (row["length"] for row in rows() if (row["instructions"], row["dtype"], row["direction"]) == asked)
    length = next(found, UNMEASURED)
    size = max(tree.block_q, tree.block_k)
    given = {field.name: getattr(tree, field.name) for field in fields(tree)}
    return Auto(**given, crossover=-(-length // size) * size)


def rows() -> list[dict[str, Any]]:
    """The rows of the table as they stand there."""
    found: list[dict[str, Any]] = tomllib.loads(TABLE.read_text())["measured"]
    return found
