"""Triton kernels of block-sparse products: gather (forward, dgrad), sampled (wgrad), and the sums that finish them.

gather   Y[t, n] = act(sum over k of X[t, k] W[n, k] + bias[n] + residual[t, n]);  dgrad is the same with W transposed

              k ->                     n ->             X [tokens, columns], Y [tokens, rows], any X strides
       t  . x x . x x .         t  +---+                W: blocks BLOCK_N x BLOCK_K, of GROUP block rows per tile
       |  . x x . x x .   *  k  |  | Y |                x: the columns where one of the tile's rows has a block
       v  . x x . x x .         v  +---+

         One program per unit of the plan (a row of tiles, or a part of a long one) and TILE_T tokens. It walks the
         unit's entries, TILE_K columns at a step: several blocks where they are narrower, parts of one where they are
         wider. Nothing in the loop depends on the data; the entries of the next step are loaded a step ahead.

sampled  dW[e, r, c] = sum over t of dY[t, row(e) * BLOCK_N + r] X[t, column(e) * BLOCK_K + c]

         One program per strip of blocks of one block row, which share dY, and per chunk of tokens.

Sums are in fp32, by rising k (t) within a program; a second kernel adds parts and chunks, in order. Their number
follows from pattern and shape: the same input gives the same bits.
Copies are ordinary asynchronous ones on every GPU. Tensor descriptors would save Hopper instructions, but those are not
what binds, by the emulator's counts (tests/gpu/test_counters.py); whether a persistent grid helps, no model here says.
Limits: blocks' sides are 16, 32, 64 or 128. Columns and rows beyond the edge are never read: overhanging entries of W
do not matter, those of dW are 0. Where a tile has several block rows, a NaN or Inf in X spreads as in a dense product,
to outputs that have no block there (0 * NaN).
"""

import triton
import triton.language as tl


@triton.jit
def gather(
    x, values, bias, residual, y, partial, plan,
    tokens, columns, rows, x_token, x_column, residual_token, residual_row, units, units_at, entries_at,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TILE_T: tl.constexpr, TILE_K: tl.constexpr, ORDER: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, SINGLES: tl.constexpr,
):  # fmt: skip
    TILE_N: tl.constexpr = BLOCK_N * GROUP
    # Known divisors let loads and stores be vectors. Triton finds out about 16 by itself, not about 8 and 4.
    columns, x_token = columns // X_ALIGN * X_ALIGN, x_token // X_ALIGN * X_ALIGN
    rows = rows // Y_ALIGN * Y_ALIGN
    # ORDER tiles of tokens at a time, so that what they read of X stays in the second-level cache for all units.
    tiles = tl.cdiv(tokens, TILE_T)
    program = tl.program_id(0)
    first_tile = program // (ORDER * units) * ORDER
    abreast = min(tiles - first_tile, ORDER)
    unit = plan + units_at + program % (ORDER * units) // abreast * 4
    tile = first_tile + program % (ORDER * units) % abreast
    row, first, last, slot = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2), tl.load(unit + 3)
    if row < 0:
        return

    t = tile * TILE_T + tl.arange(0, TILE_T)
    n = tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    x_rows = x + tl.minimum(t, tokens - 1).to(tl.int64) * x_token  # tokens beyond the last one repeat it
    entry = plan + entries_at + first * (1 + GROUP)
    acc = tl.zeros((TILE_T, TILE_N), tl.float32)
    col, block = _entries(entry, n, k, BLOCK_N, BLOCK_K, GROUP, TRANSPOSED, TILE_T)
    for step in range((last - first) * BLOCK_K // TILE_K):
        inner_n, inner_k = n % BLOCK_N, k % BLOCK_K
        if TRANSPOSED and SINGLES:
            inner_n = tl.max_contiguous(inner_n, [1])
        if BLOCK_K > TILE_K:  # of "step * TILE_K % BLOCK_K" Triton 3.6 would not know the divisors
            inner_k += step % (BLOCK_K // TILE_K) * TILE_K
        column = col * BLOCK_K + inner_k
        inside = column < columns  # entries that pad the list have a column beyond the last
        x_tile = tl.load(_x_tile(x_rows, column, x_column), mask=inside[None, :], other=0.0)
        # W's tile as it lies in memory: a block's rows are outputs in forward, inputs in dgrad.
        if TRANSPOSED:
            w_at = block + inner_k[:, None] * BLOCK_N + inner_n[None, :]
            w_tile = tl.load(values + w_at, mask=inside[:, None] & (block >= 0), other=0.0)
        else:
            w_at = block + inner_n[:, None] * BLOCK_K + inner_k[None, :]
            w_tile = tl.load(values + w_at, mask=inside[None, :] & (block >= 0), other=0.0).T
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        ahead = (step + 1) * TILE_K // BLOCK_K * (1 + GROUP)
        col, block = _entries(entry + ahead, n, k, BLOCK_N, BLOCK_K, GROUP, TRANSPOSED, TILE_T)

    if partial is not None:
        if slot >= 0:
            at = (slot.to(tl.int64) * tokens + t)[:, None] * TILE_N + n[None, :]
            tl.store(partial + at, acc, mask=t[:, None] < tokens)
            return
    _finish(acc, t, row * TILE_N + n, bias, residual, y, tokens, rows, residual_token, residual_row, ACTIVATION)


@triton.jit
def _entries(
    entry, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr,
    TILE_T: tl.constexpr,
):  # fmt: skip
    """Block column of every k of a step, and where the blocks of its tile of W start among the values."""
    col = tl.load(entry)
    block = _blocks(entry + 1, n, BLOCK_N, GROUP, TRANSPOSED, TILE_T)
    for i in tl.static_range(1, k.shape[0] // BLOCK_K):
        is_next = k // BLOCK_K == i
        entry += 1 + GROUP
        col = tl.where(is_next, tl.load(entry), col)
        next_block = _blocks(entry + 1, n, BLOCK_N, GROUP, TRANSPOSED, TILE_T)
        block = tl.where(is_next[:, None] if TRANSPOSED else is_next[None, :], next_block, block)
    return col, block.to(tl.int64) * (BLOCK_N * BLOCK_K)  # a layer may have more than 2^31 values


@triton.jit
def _blocks(
    place, n, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr, TILE_T: tl.constexpr
):  # fmt: skip
    """The block of each row of a tile: one, a row vector (dgrad) or a column vector (forward)."""
    if GROUP > 1 and not TRANSPOSED and TILE_T > 32:
        block = tl.load(place + n // BLOCK_N)
    else:
        # Where threads hold neighbouring n (dgrad), or few n (small tiles), loads that all of them share are fewer.
        block = tl.load(place)
        for g in tl.static_range(1, GROUP):
            block = tl.where(n // BLOCK_N == g, tl.load(place + g), block)
    if GROUP > 1:
        block = block[None, :] if TRANSPOSED else block[:, None]
    return block


@triton.jit
def _x_tile(x_rows, column, x_column):
    """Where the tile of X lies: linear layers read rows of a matrix."""
    return x_rows[:, None] + (column.to(tl.int64) * x_column)[None, :]


@triton.jit
def _finish(acc, t, n, bias, residual, y, tokens, rows, residual_token, residual_row, ACTIVATION: tl.constexpr):
    """The epilogue: from sums in fp32 to outputs."""
    inside = (t < tokens)[:, None] & (n < rows)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = t.to(tl.int64)[:, None] * residual_token + n.to(tl.int64)[None, :] * residual_row
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays one
    if ACTIVATION == "gelu":
        acc = acc * 0.5 * (1 + tl.math.erf(acc * 0.7071067811865476))
    at = t.to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(
    partial, bias, residual, y, plan, tokens, rows, residual_token, residual_row, reductions_at,
    TILE_N: tl.constexpr, ACTIVATION: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Outputs of the rows of tiles that several units computed: one program per row and TILE_T tokens."""
    tiles = tl.cdiv(tokens, TILE_T)
    record = plan + reductions_at + tl.program_id(0) // tiles * 3
    row, slot, number = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    if row < 0:
        return
    t = tl.program_id(0) % tiles * TILE_T + tl.arange(0, TILE_T)
    n = tl.arange(0, TILE_N)
    acc = tl.zeros((TILE_T, TILE_N), tl.float32)
    for part in range(number):
        at = ((slot + part).to(tl.int64) * tokens + t)[:, None] * TILE_N + n[None, :]
        acc += tl.load(partial + at, mask=t[:, None] < tokens, other=0.0)
    _finish(acc, t, row * TILE_N + n, bias, residual, y, tokens, rows, residual_token, residual_row, ACTIVATION)


@triton.jit
def sampled(
    grad, x, dvalues, plan,
    tokens, rows, columns, grad_token, grad_row, x_token, x_column, chunk, chunk_size,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr, TILE_T: tl.constexpr,
    GRAD_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, SINGLES: tl.constexpr,
):  # fmt: skip
    rows, grad_token = rows // GRAD_ALIGN * GRAD_ALIGN, grad_token // GRAD_ALIGN * GRAD_ALIGN
    columns, x_token = columns // X_ALIGN * X_ALIGN, x_token // X_ALIGN * X_ALIGN
    strip = plan + tl.program_id(0) * (2 + STRIP)
    row, first = tl.load(strip), tl.load(strip + 1)
    grid_columns = tl.cdiv(columns, BLOCK_K)
    k = tl.arange(0, STRIP * BLOCK_K)
    col = tl.load(strip + 2 + k // BLOCK_K)
    column = col * BLOCK_K + k % BLOCK_K
    n = tl.arange(0, BLOCK_N)
    output = row * BLOCK_N + n
    if SINGLES:
        column, output = tl.max_contiguous(column, [1]), tl.max_contiguous(output, [1])
    x_columns = x + column.to(tl.int64) * x_column
    grad_columns = grad + output.to(tl.int64) * grad_row
    is_column, is_output = (column < columns)[:, None], (output < rows)[None, :]

    begin = tl.program_id(1) * chunk
    end = min(begin + chunk, tokens)
    acc = tl.zeros((STRIP * BLOCK_K, BLOCK_N), tl.float32)
    for start in range(begin, end, TILE_T):
        t = start + tl.arange(0, TILE_T)
        x_rows = t.to(tl.int64) * x_token
        grad_at = grad_columns[None, :] + (t.to(tl.int64) * grad_token)[:, None]
        # Transposed while it is loaded, or Triton may take it through registers; element by element, better after.
        if SINGLES:
            at = x_columns[None, :] + x_rows[:, None]
            x_tile = tl.load(at, mask=(column < columns)[None, :] & (t < end)[:, None], other=0.0).T
        else:
            at = x_columns[:, None] + x_rows[None, :]
            x_tile = tl.load(at, mask=is_column & (t < end)[None, :], other=0.0)
        grad_tile = tl.load(grad_at, mask=is_output & (t < end)[:, None], other=0.0)
        acc = tl.dot(x_tile, grad_tile, acc, input_precision=PRECISION)

    acc = tl.where(is_column & is_output, acc, 0.0)  # NaN * 0 is not 0
    block = (first + k // BLOCK_K).to(tl.int64) * (BLOCK_N * BLOCK_K)
    places = (block + k % BLOCK_K)[:, None] + (n * BLOCK_K)[None, :]
    out = dvalues + tl.program_id(1).to(tl.int64) * chunk_size
    tl.store(out + places, acc.to(dvalues.dtype.element_ty), mask=(col < grid_columns)[:, None])


@triton.jit
def sum_tokens(
    grad, sums, tokens, rows, grad_token, grad_row, chunk, TILE_N: tl.constexpr, TILE_T: tl.constexpr
):  # fmt: skip
    """sums[chunk, n] = sum of dY[t, n] over a chunk of tokens: one program per chunk and TILE_N outputs."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    grad_columns = grad + n.to(tl.int64) * grad_row
    begin = tl.program_id(1) * chunk
    end = min(begin + chunk, tokens)
    acc = tl.zeros((TILE_T, TILE_N), tl.float32)
    for start in range(begin, end, TILE_T):
        t = start + tl.arange(0, TILE_T)
        at = grad_columns[None, :] + (t.to(tl.int64) * grad_token)[:, None]
        acc += tl.load(at, mask=(t < end)[:, None] & (n < rows)[None, :], other=0.0).to(tl.float32)
    out = sums + tl.program_id(1).to(tl.int64) * rows + n
    tl.store(out, tl.sum(acc, 0).to(sums.dtype.element_ty), mask=n < rows)


@triton.jit
def add_chunks(partial, out, size, chunks, TILE: tl.constexpr):
    """out[i] = sum over chunks of partial[chunk, i]."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE,), tl.float32)
    for c in range(chunks):
        acc += tl.load(partial + c.to(tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)
