"""The passes of a layer of experts on a GPU, in Triton: tiles of rows of one expert against its matrices.

    hidden         h = x[token] W_gate_up and a = w silu(h_gate) h_up; tokens are gathered as they are loaded
    hidden_grads   g = dy[token] W_down^T; dh, a again, and the part of dw = <g, a / w> of a tile's columns
    spread         a W_down, or dh W_gate_up^T, each row to the place of its pair; a token's pairs are added afterwards
    outer          per expert the sum of outer products of its rows: x[token]^T dh, or a^T dy[token]

A row is a pair of a token and an expert, in the order of the experts; `pair` says which, in the order of the tokens, so
that pair // k is its token. A tile never holds rows of two experts: `tiles` has a triple for each, its expert, its
first row and the row behind the expert's last. There are as many triples as any routing may need, so that the host need
not know the loads; a tile without rows ends at once.

A program writes what no other writes, and nothing is added in an order that hangs on time: a result is the same to the
bit each time. Offsets into tensors are 64-bit. Widths need not fit the tiles: what is beyond them is masked.
"""

from typing import no_type_check  # Triton reads the source of what it compiles: no checker may wrap it

import triton
import triton.language as tl


@no_type_check
@triton.jit
def _rows(tiles, ROWS: tl.constexpr):
    """The expert of the program's tile, its rows, and which of them are the expert's."""
    tile = tiles + 3 * tl.program_id(0)
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    return tl.load(tile).to(tl.int64), row.to(tl.int64), row < tl.load(tile + 2)


@no_type_check
@triton.jit
def _load(x, row, column, real, inside):
    """Numbers at rows and columns, given as offsets; zeros where either is beyond."""
    return tl.load(x + row[:, None] + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)


@no_type_check
@triton.jit
def _store(x, row, column, real, inside, values):
    where = x + row[:, None] + column[None, :]
    tl.store(where, values.to(x.dtype.element_ty), mask=real[:, None] & inside[None, :])


@no_type_check
@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    """a b in fp32 sums; EXACT: of fp32 numbers as they are."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # not after it: which branch there is, is known when compiled
        return tl.dot(a, b)


@no_type_check
@triton.jit
def hidden(
    x, weight, gate_up, pair, tiles, h, a, k,
    WIDTH: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of h, gate and up, and of a."""
    if tl.load(tiles + 3 * tl.program_id(0) + 1) >= tl.load(tiles + 3 * tl.program_id(0) + 2):
        return
    expert, row, real = _rows(tiles, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < INNER
    owner = tl.load(pair + row, mask=real, other=0)
    token = (owner // k).to(tl.int64)
    gate = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    up = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < WIDTH
        left = _load(x, token * WIDTH, depth, real, deep)
        place = (expert * WIDTH + depth) * (2 * INNER)
        gate += _product(left, _load(gate_up, place, column, deep, inside), EXACT)
        up += _product(left, _load(gate_up, place, INNER + column, deep, inside), EXACT)
    place = row * (2 * INNER)
    _store(h, place, column, real, inside, gate)
    _store(h, place, INNER + column, real, inside, up)
    # as backward will find them
    gate = gate.to(h.dtype.element_ty).to(tl.float32)
    up = up.to(h.dtype.element_ty).to(tl.float32)
    share = tl.load(weight + owner, mask=real, other=0.0)
    _store(a, row * INNER, column, real, inside, gate * tl.sigmoid(gate) * up * share[:, None])


@no_type_check
@triton.jit
def hidden_grads(
    dy, weight, down, h, pair, tiles, dh, a, dweight, pairs, k,
    WIDTH: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of dh and of a, each where it is wanted, and the tile's part of dw of its rows."""
    if tl.load(tiles + 3 * tl.program_id(0) + 1) >= tl.load(tiles + 3 * tl.program_id(0) + 2):
        return
    expert, row, real = _rows(tiles, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < INNER
    owner = tl.load(pair + row, mask=real, other=0)
    token = (owner // k).to(tl.int64)
    g = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < WIDTH
        left = _load(dy, token * WIDTH, depth, real, deep)
        right = _load(down, (expert * INNER + column) * WIDTH, depth, inside, deep)
        g += _product(left, tl.trans(right), EXACT)
    place = row * (2 * INNER)
    gate = _load(h, place, column, real, inside).to(tl.float32)
    up = _load(h, place, INNER + column, real, inside).to(tl.float32)
    share = tl.load(weight + owner, mask=real, other=0.0)[:, None]
    gates = tl.sigmoid(gate)
    silu = gate * gates
    tl.store(dweight + tl.program_id(1).to(tl.int64) * pairs + owner, tl.sum(g * silu * up, 1), mask=real)
    if a is not None:
        _store(a, row * INNER, column, real, inside, silu * up * share)
    if dh is not None:
        g *= share
        _store(dh, place, column, real, inside, g * up * (gates + silu * (1.0 - gates)))
        _store(dh, place, INNER + column, real, inside, g * silu)


@no_type_check
@triton.jit
def spread(
    left, matrices, pair, tiles, out,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows of `left` times their expert's matrix [LENGTH, WIDTH], stored TURNED or not, at their pairs' rows."""
    if tl.load(tiles + 3 * tl.program_id(0) + 1) >= tl.load(tiles + 3 * tl.program_id(0) + 2):
        return
    expert, row, real = _rows(tiles, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    found = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, LENGTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        deep = depth < LENGTH
        if TURNED:
            right = tl.trans(_load(matrices, (expert * WIDTH + column) * LENGTH, depth, inside, deep))
        else:
            right = _load(matrices, (expert * LENGTH + depth) * WIDTH, column, deep, inside)
        found += _product(_load(left, row * LENGTH, depth, real, deep), right, EXACT)
    owner = tl.load(pair + row, mask=real, other=0).to(tl.int64)
    _store(out, owner * WIDTH, column, real, inside, found)


@no_type_check
@triton.jit
def outer(
    left, right, pair, counts, ends, out, k,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GATHERED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's matrix [HEIGHT, WIDTH]: left^T right over its rows, DEPTH at a time; of the GATHERED one,
    "left" or "right", a row is that of the pair's token.
    """
    expert = tl.program_id(2).to(tl.int64)
    stop = tl.load(ends + expert)
    line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(stop - tl.load(counts + expert), stop, DEPTH):
        row = start + tl.arange(0, DEPTH)
        real = row < stop
        token = (tl.load(pair + row, mask=real, other=0) // k).to(tl.int64)
        at_left = token if GATHERED == "left" else row
        at_right = token if GATHERED == "right" else row
        high = _load(left, at_left * HEIGHT, line, real, line < HEIGHT)
        found += _product(tl.trans(high), _load(right, at_right * WIDTH, column, real, column < WIDTH), EXACT)
    _store(out, (expert * HEIGHT + line) * WIDTH, column, line < HEIGHT, column < WIDTH, found)
