"""Triton: a mixture of a linear for a few tokens, where launches are what costs. Host side in `decode.py`.

Legend: T tokens, D input features, N output features, C ranks of all experts of a linear, G gates of a token, V = C / G
consecutive ranks of a gate, K chosen gates.
"""

# mypy: disallow-incomplete-defs=False
# Only the constexpr parameters of a kernel are annotated, which Triton needs; the others have no Python type.

import triton
import triton.language as tl


@triton.jit
def _rows_times_x(
    x_ptr, m_ptr, out_ptr, block, begin, end, T, rows, stride_out, D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of rows times features begin to end of all tokens, by multiply-adds: for one token, or exact weights."""
    t = tl.arange(0, BLOCK_T)
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_J, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_D):
        inside = start + d < end
        x = tl.load(x_ptr + t[:, None] * D + (start + d)[None, :], (t < T)[:, None] & inside[None, :], 0.0)
        m = tl.load(
            m_ptr + j.to(tl.int64)[:, None] * D + (start + d)[None, :], (j < rows)[:, None] & inside[None, :], 0.0
        )
        total += x.to(tl.float32)[:, None, :] * m.to(tl.float32)[None, :, :]
    valid = (t < T)[:, None] & (j < rows)[None, :]
    tl.store(out_ptr + t[:, None] * stride_out + j[None, :], tl.sum(total, 2), valid)


@triton.jit
def _rows_dot_x(
    x_ptr, m_ptr, out_ptr, block, begin, end, T, rows, stride_out, D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The same by matrix units, for several tokens."""
    t = tl.arange(0, BLOCK_T)
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    d = tl.arange(0, 128)
    total = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    for start in range(begin, end, 128):
        inside = start + d < end
        x = tl.load(x_ptr + t[:, None] * D + (start + d)[None, :], (t < T)[:, None] & inside[None, :], 0.0)
        m = tl.load(
            m_ptr + j.to(tl.int64)[:, None] * D + (start + d)[None, :], (j < rows)[:, None] & inside[None, :], 0.0
        )
        total = tl.dot(x, tl.trans(m.to(x.dtype)), total, input_precision="ieee")
    valid = (t < T)[:, None] & (j < rows)[None, :]
    tl.store(out_ptr + t[:, None] * stride_out + j[None, :], total, valid)


@triton.jit
def _experts_rows(
    x_ptr, m_ptr, out_ptr, program, T, rows, A, D: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, part = program // SPLITS, program % SPLITS
    begin, end = part * CHUNK, min(D, (part + 1) * CHUNK)
    out_ptr += part * T * A
    if BLOCK_T == 1:
        _rows_times_x(x_ptr, m_ptr, out_ptr, block, begin, end, T, rows, A, D, BLOCK_T, BLOCK_J, BLOCK_D)
    else:
        _rows_dot_x(x_ptr, m_ptr, out_ptr, block, begin, end, T, rows, A, D, max(16, BLOCK_T), BLOCK_J)


@triton.jit(do_not_specialize=["T"])
def few_shrink_kernel(
    x_ptr,  # (T, D)
    a0_ptr, a1_ptr, a2_ptr,  # (rows, D) matrices of experts
    w0_ptr, w1_ptr, w2_ptr,  # (rows, D) matrices of routers
    ranks_ptr,  # (SPLITS, T, sum of rows) fp32 out
    logits_ptr,  # (T, sum of rows) fp32 out
    T, D: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    W2: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, TILE_T: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``x M^T`` for up to three matrices of experts and three of routers, A0 to W2 their rows (0: absent), in fp32.

    Grid: (blocks of rows of the experts times SPLITS, then single rows of the routers times TILES). A program owns a
    block of rows of one matrix and a chunk of the features, for all tokens; who reads the ranks adds the chunks. Logits
    are whole, a program's for TILE_T tokens.
    """
    E0: tl.constexpr = tl.cdiv(A0, BLOCK_J) * SPLITS
    E1: tl.constexpr = E0 + tl.cdiv(A1, BLOCK_J) * SPLITS
    E2: tl.constexpr = E1 + tl.cdiv(A2, BLOCK_J) * SPLITS
    A: tl.constexpr = A0 + A1 + A2
    W: tl.constexpr = W0 + W1 + W2
    program = tl.program_id(0)
    if program < E0:
        _experts_rows(x_ptr, a0_ptr, ranks_ptr, program, T, A0, A, D, CHUNK, SPLITS, BLOCK_T, BLOCK_J, BLOCK_D)
    elif program < E1:
        _experts_rows(
            x_ptr, a1_ptr, ranks_ptr + A0, program - E0, T, A1, A, D, CHUNK, SPLITS, BLOCK_T, BLOCK_J, BLOCK_D
        )
    elif program < E2:
        _experts_rows(
            x_ptr, a2_ptr, ranks_ptr + A0 + A1, program - E1, T, A2, A, D, CHUNK, SPLITS, BLOCK_T, BLOCK_J, BLOCK_D
        )
    else:
        # Few tokens for each program: one alone would read all of them, long after the others are over.
        tile, row = (program - E2) % TILES * TILE_T, (program - E2) // TILES
        x_ptr, logits_ptr, T = x_ptr + tile * D, logits_ptr + tile * W, T - tile
        if row < W0:
            _rows_times_x(x_ptr, w0_ptr, logits_ptr, row, 0, D, T, W0, W, D, TILE_T, 1, BLOCK_W)
        elif row < W0 + W1:
            _rows_times_x(x_ptr, w1_ptr, logits_ptr + W0, row - W0, 0, D, T, W1, W, D, TILE_T, 1, BLOCK_W)
        else:
            _rows_times_x(x_ptr, w2_ptr, logits_ptr + W0 + W1, row - W0 - W1, 0, D, T, W2, W, D, TILE_T, 1, BLOCK_W)


@triton.jit
def few_expand_kernel(
    y_ptr,  # (T, N): read and written
    ranks_ptr,  # (SPLITS, T, C), rows `stride_ranks` apart, the parts of a sum `stride_split`
    gates_ptr,  # (T, G) fp32
    ids_ptr,  # (T, K) int64
    b_ptr,  # (C, N)
    N, stride_ranks, stride_split, scaling,
    SPLITS: tl.constexpr, C: tl.constexpr, G: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    GATED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``y += scaling * (gates . ranks) B``, reading of B only the rows of the chosen where K > 0, else all.

    Grid: (blocks of N, T); a program owns a block of features of one token.
    """
    t = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    V: tl.constexpr = C // G
    ROWS: tl.constexpr = K * V if K else C
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, ROWS, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)
        inside = i < ROWS
        if K:
            gate_at = tl.load(ids_ptr + t * K + i // V, inside, 0)
            c = gate_at * V + i % V
        else:
            gate_at = i // V
            c = i
        at = ranks_ptr + t * stride_ranks + (c % V if SHARED else c)
        value = tl.load(at, inside, 0.0).to(tl.float32)
        for part in tl.static_range(1, SPLITS):
            value += tl.load(at + part * stride_split, inside, 0.0).to(tl.float32)
        value *= scaling
        if GATED:
            value *= tl.load(gates_ptr + t * G + gate_at, inside, 0.0)
        b = tl.load(b_ptr + c.to(tl.int64)[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :], 0.0)
        total += tl.sum(value[:, None] * b.to(tl.float32), 0)
    at = t.to(tl.int64) * N + n
    y = tl.load(y_ptr + at, n < N, 0.0).to(tl.float32) + total
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["T"])
def few_product_kernel(
    y_ptr,  # (T, N): read and written
    ranks_ptr,  # (SPLITS, T, C or V) as above, any float
    gates_ptr,  # (T, G) fp32
    b_ptr,  # (C, N)
    T, N, stride_ranks, stride_split, scaling, SPLITS: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    SHARED: tl.constexpr, GATED: tl.constexpr, IEEE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same with all rows of B, by matrix units: the gated ranks are rounded to the dtype of y.

    Grid: (blocks of N,); a program owns a block of features of all tokens.
    """
    t = tl.arange(0, BLOCK_T)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    V: tl.constexpr = C // G
    at, inside = t.to(tl.int64) * N + n, (t < T) & (n < N)
    # y first: what waits for it is hidden by the products.
    y = tl.load(y_ptr + at, inside, 0.0)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in tl.static_range(0, C, BLOCK_C):
        row = start + tl.arange(0, BLOCK_C)[:, None]
        b = tl.load(b_ptr + row.to(tl.int64) * N + n, (row < C) & (n < N), 0.0)
        c = start + tl.arange(0, BLOCK_C)[None, :]
        valid = (t < T) & (c < C)
        from_ptr = ranks_ptr + t * stride_ranks + (c % V if SHARED else c)
        value = tl.load(from_ptr, valid, 0.0).to(tl.float32)
        for part in tl.static_range(1, SPLITS):
            value += tl.load(from_ptr + part * stride_split, valid, 0.0).to(tl.float32)
        value *= scaling
        if GATED:
            value *= tl.load(gates_ptr + t * G + c // V, valid, 0.0)
        value = value.to(y_ptr.dtype.element_ty)
        total = tl.dot(value, b.to(value.dtype), total, input_precision="ieee" if IEEE else "tf32")
    tl.store(y_ptr + at, (y.to(tl.float32) + total).to(y_ptr.dtype.element_ty), inside)
