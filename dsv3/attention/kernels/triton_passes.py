"""The passes of block-sparse attention on a GPU, in Triton: tiles of queries against listed keys, and the other way.

    forward        out and lse of a tile of queries, softmax online over the keys that it lists (FlashAttention's)
    query_grads    grad_q of a tile of queries, and delta = sum(grad * out) of each row for the next pass
    key_grads      grad_k, grad_v and the gradient of the weights of a tile of keys, over the inverse of the lists

A row of a tile is a query of a head. Heads that share keys and lists stand side by side, STACK of them per token, so
that keys are read once for all and a block of a single token fills the 16 rows that a product wants (the layout of
NSA's kernels, arXiv 2502.11089). Columns are keys, and count through all blocks that a block of queries lists; the rows
of `key_grads` count through all blocks of queries that list the tile's keys. So the sizes of tiles and blocks need not
fit each other.

A program writes what no other writes and adds in the order of its list: a result is the same to the bit each time.
Offsets into tensors are 64-bit, since a million tokens of 16 heads pass 2^31. Scores are in base 2, lse in base e.
"""

from typing import no_type_check  # Triton reads the source of what it compiles: no checker may wrap it

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNSEEN = tl.constexpr(-1e30)  # its power of two is 0; finite, so that no difference of two is NaN


@no_type_check
@triton.jit
def _place(shape, STACK: tl.constexpr, ROWS: tl.constexpr):
    """Where the program's rows stand: batch, key-value head, list, each row's head and token, whether it exists."""
    heads, groups, shared, queries, block_q = shape[0], shape[1], shape[2], shape[3], shape[5]
    tiles = (block_q * STACK + ROWS - 1) // ROWS
    stacks, blocks = heads // STACK, (queries + block_q - 1) // block_q
    place = tl.program_id(0)
    unit = place // (tiles * blocks)
    # the last block of queries first: lists grow towards the end, and the longest piece should not come last
    block = blocks - 1 - place // tiles % blocks
    batch, stack = (unit // stacks).to(tl.int64), unit % stacks
    row = place % tiles * ROWS + tl.arange(0, ROWS)
    head = (stack * STACK + row % STACK).to(tl.int64)
    token = (block * block_q + row // STACK).to(tl.int64)
    shelf = batch * shared + stack * shared // stacks
    group = stack * groups // stacks
    return batch, group, shelf, shelf * blocks + block, head, token, (row < block_q * STACK) & (token < queries)


@no_type_check
@triton.jit
def _rows(x, offset, real, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a tensor, zeros beyond its width and where there is no row."""
    column = tl.arange(0, PADDED)
    return tl.load(x + offset[:, None] + column[None, :], mask=real[:, None] & (column < WIDTH)[None, :], other=0.0)


@no_type_check
@triton.jit
def _store(x, offset, real, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    where = x + offset[:, None] + column[None, :]
    tl.store(where, rows.to(x.dtype.element_ty), mask=real[:, None] & (column < WIDTH)[None, :])


@no_type_check
@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    """a b in fp32 sums; EXACT: of fp32 numbers as they are, else of numbers in the format of b."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # not after it: which branch there is, is known when compiled
        return tl.dot(a.to(b.dtype), b)


@no_type_check
@triton.jit
def _keys(listed, start, columns, total, block_k, COLUMNS: tl.constexpr):
    """The keys of the next columns, and whether there is one."""
    column = start + tl.arange(0, COLUMNS)
    block = tl.load(listed + column // block_k, mask=column < columns, other=0)
    key = block.to(tl.int64) * block_k + column % block_k
    return key, (column < columns) & (key < total)


@no_type_check
@triton.jit
def _scores(left, right, key, there, last, weights, rank, allowed, scale, EXACT: tl.constexpr):
    """The scores of queries against keys, and which are seen; weights and ranks begin at the list's own."""
    score = _product(left, tl.trans(right), EXACT) * scale
    seen = there[None, :] & (key[None, :] <= last[:, None])
    if weights is not None:
        score += (tl.load(weights + key, mask=there, other=0.0) * LOG2E)[None, :]
    if rank is not None:
        seen &= tl.load(rank + key, mask=there, other=0)[None, :] <= allowed[:, None]
    return score, seen


@no_type_check
@triton.jit
def forward(
    q, k, v, q_strides, k_strides, v_strides, lists, counts, weights, rank, limit, out, lse, shape, scale,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, LONG: tl.constexpr,
    STACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of queries: its output, and the logarithm of each row's denominator, -inf where it sees no key."""
    heads, queries, total, block_k, most = shape[0], shape[3], shape[4], shape[6], shape[7]
    batch, group, shelf, listing, head, token, real = _place(shape, STACK, ROWS)
    left = _rows(q, batch * q_strides[0] + head * q_strides[1] + token * q_strides[2], real, WIDTH, WIDE)
    k += batch * k_strides[0] + group * k_strides[1]
    v += batch * v_strides[0] + group * v_strides[1]
    allowed = token
    if weights is not None:
        weights += shelf * total
    if rank is not None:
        rank += shelf * total
        allowed = tl.load(limit + shelf * queries + token, mask=real, other=0)
    top = tl.full((ROWS,), UNSEEN, tl.float32)
    sums = tl.full((ROWS,), 0.0, tl.float32)
    found = tl.full((ROWS, LONG), 0.0, tl.float32)
    columns = tl.load(counts + listing) * block_k
    for start in range(0, columns, COLUMNS):
        key, there = _keys(lists + listing * most, start, columns, total, block_k, COLUMNS)
        right = _rows(k, key * k_strides[2], there, WIDTH, WIDE)
        last = token + (total - queries)
        score, seen = _scores(left, right, key, there, last, weights, rank, allowed, scale, EXACT)
        higher = tl.maximum(top, tl.max(tl.where(seen, score, UNSEEN), 1))
        softmax = tl.exp2(tl.where(seen, score - higher[:, None], UNSEEN))
        kept = tl.exp2(top - higher)
        top = higher
        sums = sums * kept + tl.sum(softmax, 1)
        right = _rows(v, key * v_strides[2], there, VALUE, LONG)
        found = found * kept[:, None] + _product(softmax, right, EXACT)
    row = (batch * heads + head) * queries + token
    blind = sums == 0
    sums = tl.where(blind, 1.0, sums)
    _store(out, row * VALUE, real, found / sums[:, None], VALUE, LONG)
    tl.store(lse + row, tl.where(blind, float("-inf"), (top + tl.log2(sums)) * LN2), mask=real)


@no_type_check
@triton.jit
def query_grads(
    grad, q, k, v, grad_strides, q_strides, k_strides, v_strides, lists, counts, weights, rank, limit,
    out, lse, delta, grad_q, shape, scale, to_logits,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, LONG: tl.constexpr,
    STACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of queries: its rows of grad_q, and delta."""
    heads, queries, total, block_k, most = shape[0], shape[3], shape[4], shape[6], shape[7]
    batch, group, shelf, listing, head, token, real = _place(shape, STACK, ROWS)
    row = (batch * heads + head) * queries + token
    left = _rows(q, batch * q_strides[0] + head * q_strides[1] + token * q_strides[2], real, WIDTH, WIDE)
    pull = batch * grad_strides[0] + head * grad_strides[1] + token * grad_strides[2]
    pull = _rows(grad, pull, real, VALUE, LONG)
    mean = tl.sum(pull.to(tl.float32) * _rows(out, row * VALUE, real, VALUE, LONG).to(tl.float32), 1)
    tl.store(delta + row, mean, mask=real)
    level = tl.load(lse + row, mask=real, other=0.0) * LOG2E
    k += batch * k_strides[0] + group * k_strides[1]
    v += batch * v_strides[0] + group * v_strides[1]
    allowed = token
    if weights is not None:
        weights += shelf * total
    if rank is not None:
        rank += shelf * total
        allowed = tl.load(limit + shelf * queries + token, mask=real, other=0)
    found = tl.full((ROWS, WIDE), 0.0, tl.float32)
    columns = tl.load(counts + listing) * block_k
    for start in range(0, columns, COLUMNS):
        key, there = _keys(lists + listing * most, start, columns, total, block_k, COLUMNS)
        right = _rows(k, key * k_strides[2], there, WIDTH, WIDE)
        last = token + (total - queries)
        score, seen = _scores(left, right, key, there, last, weights, rank, allowed, scale, EXACT)
        softmax = tl.exp2(tl.where(seen, score - level[:, None], UNSEEN))
        values = _rows(v, key * v_strides[2], there, VALUE, LONG)
        slope = softmax * (_product(pull, tl.trans(values), EXACT) - mean[:, None])
        found += _product(slope, right, EXACT)
    _store(grad_q, row * WIDTH, real, found * to_logits, WIDTH, WIDE)


@no_type_check
@triton.jit
def key_grads(
    grad, q, k, v, grad_strides, q_strides, k_strides, v_strides, first, inverse, weights, rank, limit,
    lse, delta, grad_k, grad_v, grad_weights, shape, scale, to_logits,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, LONG: tl.constexpr,
    STACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one head: its rows of grad_k, grad_v and, per list, of the gradient of the weights."""
    heads, groups, shared, queries, total = shape[0], shape[1], shape[2], shape[3], shape[4]
    block_q, block_k = shape[5], shape[6]
    tiles = (block_k + COLUMNS - 1) // COLUMNS
    blocks, stacks = (total + block_k - 1) // block_k, heads // STACK
    place = tl.program_id(0)
    unit, block = place // (tiles * blocks), place // tiles % blocks
    batch, group = (unit // groups).to(tl.int64), unit % groups
    column = place % tiles * COLUMNS + tl.arange(0, COLUMNS)
    key = block.to(tl.int64) * block_k + column
    there = (column < block_k) & (key < total)
    left = _rows(k, batch * k_strides[0] + group * k_strides[1] + key * k_strides[2], there, WIDTH, WIDE)
    values = _rows(v, batch * v_strides[0] + group * v_strides[1] + key * v_strides[2], there, VALUE, LONG)
    found_k = tl.full((COLUMNS, WIDE), 0.0, tl.float32)
    found_v = tl.full((COLUMNS, LONG), 0.0, tl.float32)
    for stack in range(group * stacks // groups, (group + 1) * stacks // groups):
        shelf = batch * shared + stack * shared // stacks
        added = tl.full((COLUMNS,), 0.0, tl.float32)
        if weights is not None:
            added += tl.load(weights + shelf * total + key, mask=there, other=0.0) * LOG2E
        ranked = key
        if rank is not None:
            ranked = tl.load(rank + shelf * total + key, mask=there, other=0)
        pulled = tl.full((COLUMNS,), 0.0, tl.float32)
        begin = tl.load(first + shelf * blocks + block)
        rows = (tl.load(first + shelf * blocks + block + 1) - begin) * (block_q * STACK)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            at = tl.load(inverse + begin + row // (block_q * STACK), mask=row < rows, other=0)
            token = at.to(tl.int64) * block_q + row % (block_q * STACK) // STACK
            head = stack * STACK + row % STACK
            real = (row < rows) & (token < queries)
            right = _rows(q, batch * q_strides[0] + head * q_strides[1] + token * q_strides[2], real, WIDTH, WIDE)
            pull = batch * grad_strides[0] + head * grad_strides[1] + token * grad_strides[2]
            pull = _rows(grad, pull, real, VALUE, LONG)
            spot = (batch * heads + head) * queries + token
            level = tl.load(lse + spot, mask=real, other=0.0) * LOG2E
            mean = tl.load(delta + spot, mask=real, other=0.0)
            seen = real[None, :] & (key[:, None] <= (token + (total - queries))[None, :])
            if rank is not None:
                allowed = tl.load(limit + shelf * queries + token, mask=real, other=0)
                seen &= ranked[:, None] <= allowed[None, :]
            score = _product(left, tl.trans(right), EXACT) * scale + added[:, None]
            softmax = tl.exp2(tl.where(seen, score - level[None, :], UNSEEN))
            slope = softmax * (_product(values, tl.trans(pull), EXACT) - mean[None, :])
            found_v += _product(softmax, pull, EXACT)
            found_k += _product(slope, right, EXACT)
            if weights is not None:
                pulled += tl.sum(slope, 1)
        if weights is not None:
            tl.store(grad_weights + (batch * stacks + stack) * total + key, pulled, mask=there)
    row = (batch * groups + group) * total + key
    _store(grad_k, row * WIDTH, there, found_k * to_logits, WIDTH, WIDE)
    _store(grad_v, row * VALUE, there, found_v, VALUE, LONG)
