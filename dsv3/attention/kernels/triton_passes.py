"""The passes of block-sparse attention on a GPU, in Triton: tiles of queries against listed keys, and the other way.

    forward        out and lse of a tile of queries, softmax online over the keys that it lists (FlashAttention's)
    query_grads    grad_q of a tile of queries, and delta = sum(grad * out) of each row for the next pass
    key_grads      grad_k, grad_v and the gradient of the weights of a tile of keys, over the inverse of the lists

A row of a tile is a query of a head. Heads that share keys and lists stand side by side, STACK of them per token, so
that keys are read once for all and a block of a single token fills the 16 rows that a product wants (the layout of
NSA's kernels, arXiv 2502.11089). Columns are keys, and count through all blocks that a block of queries lists; the rows
of `key_grads` count through all blocks of queries that list the tile's keys. So the sizes of tiles and blocks need not
fit each other. A width between powers of two is cut in two, WIDE and REST: latent heads have 128 + 64 numbers.

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
    program = tl.program_id(0)
    unit = program // (tiles * blocks)
    # the last block of queries first: lists grow towards the end, and the longest piece should not come last
    block = blocks - 1 - program // tiles % blocks
    batch, stack = (unit // stacks).to(tl.int64), unit % stacks
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    head = (stack * STACK + row % STACK).to(tl.int64)
    token = (block * block_q + row // STACK).to(tl.int64)
    shelf = batch * shared + stack * shared // stacks
    group = stack * groups // stacks
    return batch, group, shelf, shelf * blocks + block, head, token, (row < block_q * STACK) & (token < queries)


@no_type_check
@triton.jit
def _rows(x, offset, real, WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT numbers of each row from FIRST on, zeros beyond its width and where there is no row."""
    column = FIRST + tl.arange(0, COUNT)
    return tl.load(x + offset[:, None] + column[None, :], mask=real[:, None] & (column < WIDTH)[None, :], other=0.0)


@no_type_check
@triton.jit
def _store(x, offset, real, rows, WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    column = FIRST + tl.arange(0, COUNT)
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
def _scores(score, key, there, last, weights, rank, allowed):
    """Scores with their weights, and which are seen; weights and ranks begin at the list's own."""
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
    WIDTH: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, LONG: tl.constexpr,
    STACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of queries: its output, and the logarithm of each row's denominator, -inf where it sees no key."""
    heads, queries, total, block_k, most = shape[0], shape[3], shape[4], shape[6], shape[7]
    batch, group, shelf, listing, head, token, real = _place(shape, STACK, ROWS)
    at = batch * q_strides[0] + head * q_strides[1] + token * q_strides[2]
    left = _rows(q, at, real, WIDTH, 0, WIDE)
    if REST:
        left_rest = _rows(q, at, real, WIDTH, WIDE, REST)
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
        right = _rows(k, key * k_strides[2], there, WIDTH, 0, WIDE)
        score = _product(left, tl.trans(right), EXACT)
        if REST:
            right = _rows(k, key * k_strides[2], there, WIDTH, WIDE, REST)
            score += _product(left_rest, tl.trans(right), EXACT)
        score, seen = _scores(score * scale, key, there, token + (total - queries), weights, rank, allowed)
        higher = tl.maximum(top, tl.max(tl.where(seen, score, UNSEEN), 1))
        softmax = tl.exp2(tl.where(seen, score - higher[:, None], UNSEEN))
        kept = tl.exp2(top - higher)
        top = higher
        sums = sums * kept + tl.sum(softmax, 1)
        values = _rows(v, key * v_strides[2], there, VALUE, 0, LONG)
        found = found * kept[:, None] + _product(softmax, values, EXACT)
    row = (batch * heads + head) * queries + token
    blind = sums == 0
    sums = tl.where(blind, 1.0, sums)
    _store(out, row * VALUE, real, found / sums[:, None], VALUE, 0, LONG)
    tl.store(lse + row, tl.where(blind, float("-inf"), (top + tl.log2(sums)) * LN2), mask=real)


@no_type_check
@triton.jit
def query_grads(
    grad, q, k, v, grad_strides, q_strides, k_strides, v_strides, lists, counts, weights, rank, limit,
    out, lse, delta, grad_q, shape, scale, to_logits,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, LONG: tl.constexpr,
    STACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of queries: its rows of grad_q, and delta."""
    heads, queries, total, block_k, most = shape[0], shape[3], shape[4], shape[6], shape[7]
    batch, group, shelf, listing, head, token, real = _place(shape, STACK, ROWS)
    row = (batch * heads + head) * queries + token
    at = batch * q_strides[0] + head * q_strides[1] + token * q_strides[2]
    left = _rows(q, at, real, WIDTH, 0, WIDE)
    found = tl.full((ROWS, WIDE), 0.0, tl.float32)
    if REST:
        left_rest = _rows(q, at, real, WIDTH, WIDE, REST)
        found_rest = tl.full((ROWS, REST), 0.0, tl.float32)
    at = batch * grad_strides[0] + head * grad_strides[1] + token * grad_strides[2]
    pull = _rows(grad, at, real, VALUE, 0, LONG)
    mean = tl.sum(pull.to(tl.float32) * _rows(out, row * VALUE, real, VALUE, 0, LONG).to(tl.float32), 1)
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
    columns = tl.load(counts + listing) * block_k
    for start in range(0, columns, COLUMNS):
        key, there = _keys(lists + listing * most, start, columns, total, block_k, COLUMNS)
        right = _rows(k, key * k_strides[2], there, WIDTH, 0, WIDE)
        score = _product(left, tl.trans(right), EXACT)
        if REST:
            right_rest = _rows(k, key * k_strides[2], there, WIDTH, WIDE, REST)
            score += _product(left_rest, tl.trans(right_rest), EXACT)
        score, seen = _scores(score * scale, key, there, token + (total - queries), weights, rank, allowed)
        softmax = tl.exp2(tl.where(seen, score - level[:, None], UNSEEN))
        values = _rows(v, key * v_strides[2], there, VALUE, 0, LONG)
        slope = softmax * (_product(pull, tl.trans(values), EXACT) - mean[:, None])
        found += _product(slope, right, EXACT)
        if REST:
            found_rest += _product(slope, right_rest, EXACT)
    _store(grad_q, row * WIDTH, real, found * to_logits, WIDTH, 0, WIDE)
    if REST:
        _store(grad_q, row * WIDTH, real, found_rest * to_logits, WIDTH, WIDE, REST)


@no_type_check
@triton.jit
def key_grads(
    grad, q, k, v, grad_strides, q_strides, k_strides, v_strides, first, inverse, weights, rank, limit,
    lse, delta, grad_k, grad_v, grad_weights, shape, scale, to_logits,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, LONG: tl.constexpr,
    STACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one head: its rows of grad_k, grad_v and, per list, of the gradient of the weights."""
    heads, groups, shared, queries, total = shape[0], shape[1], shape[2], shape[3], shape[4]
    block_q, block_k = shape[5], shape[6]
    tiles = (block_k + COLUMNS - 1) // COLUMNS
    blocks, stacks = (total + block_k - 1) // block_k, heads // STACK
    program = tl.program_id(0)
    # the first block of keys first: it may be listed by all queries
    unit, block = program // (tiles * blocks), program // tiles % blocks
    batch, group = (unit // groups).to(tl.int64), unit % groups
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    key = block.to(tl.int64) * block_k + column
    there = (column < block_k) & (key < total)
    at = batch * k_strides[0] + group * k_strides[1] + key * k_strides[2]
    left = _rows(k, at, there, WIDTH, 0, WIDE)
    found_k = tl.full((COLUMNS, WIDE), 0.0, tl.float32)
    if REST:
        left_rest = _rows(k, at, there, WIDTH, WIDE, REST)
        found_rest = tl.full((COLUMNS, REST), 0.0, tl.float32)
    at = batch * v_strides[0] + group * v_strides[1] + key * v_strides[2]
    values = _rows(v, at, there, VALUE, 0, LONG)
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
            owner = tl.load(inverse + begin + row // (block_q * STACK), mask=row < rows, other=0)
            token = owner.to(tl.int64) * block_q + row % (block_q * STACK) // STACK
            head = stack * STACK + row % STACK
            real = (row < rows) & (token < queries)
            place = batch * q_strides[0] + head * q_strides[1] + token * q_strides[2]
            right = _rows(q, place, real, WIDTH, 0, WIDE)
            score = _product(left, tl.trans(right), EXACT)
            if REST:
                right_rest = _rows(q, place, real, WIDTH, WIDE, REST)
                score += _product(left_rest, tl.trans(right_rest), EXACT)
            score = score * scale + added[:, None]
            place = batch * grad_strides[0] + head * grad_strides[1] + token * grad_strides[2]
            pull = _rows(grad, place, real, VALUE, 0, LONG)
            place = (batch * heads + head) * queries + token
            level = tl.load(lse + place, mask=real, other=0.0) * LOG2E
            mean = tl.load(delta + place, mask=real, other=0.0)
            seen = real[None, :] & (key[:, None] <= (token + (total - queries))[None, :])
            if rank is not None:
                allowed = tl.load(limit + shelf * queries + token, mask=real, other=0)
                seen &= ranked[:, None] <= allowed[None, :]
            softmax = tl.exp2(tl.where(seen, score - level[None, :], UNSEEN))
            slope = softmax * (_product(values, tl.trans(pull), EXACT) - mean[None, :])
            found_v += _product(softmax, pull, EXACT)
            found_k += _product(slope, right, EXACT)
            if REST:
                found_rest += _product(slope, right_rest, EXACT)
            if weights is not None:
                pulled += tl.sum(slope, 1)
        if weights is not None:
            tl.store(grad_weights + (batch * stacks + stack) * total + key, pulled, mask=there)
    row = (batch * groups + group) * total + key
    _store(grad_k, row * WIDTH, there, found_k * to_logits, WIDTH, 0, WIDE)
    if REST:
        _store(grad_k, row * WIDTH, there, found_rest * to_logits, WIDTH, WIDE, REST)
    _store(grad_v, row * VALUE, there, found_v, VALUE, 0, LONG)
