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
    x_ptr, m_ptr, out_ptr, block, T, rows, stride_out, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_J, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + d < D
        x = tl.load(x_ptr + t[:, None] * D + (start + d)[None, :], (t < T)[:, None] & inside[None, :], 0.0)
        m = tl.load(
            m_ptr + j.to(tl.int64)[:, None] * D + (start + d)[None, :], (j < rows)[:, None] & inside[None, :], 0.0
        )
        total += x.to(tl.float32)[:, None, :] * m.to(tl.float32)[None, :, :]
    valid = (t < T)[:, None] & (j < rows)[None, :]
    tl.store(out_ptr + t[:, None] * stride_out + j[None, :], tl.sum(total, 2), valid)


@triton.jit(do_not_specialize=["T"])
def few_shrink_kernel(
    x_ptr,  # (T, D)
    a0_ptr, a1_ptr, a2_ptr,  # (rows, D) matrices of experts
    w0_ptr, w1_ptr, w2_ptr,  # (rows, D) matrices of routers
    ranks_ptr,  # (T, sum of rows) fp32 out
    logits_ptr,  # (T, sum of rows) fp32 out
    T, D: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    W2: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``x M^T`` for up to three matrices of experts and three of routers, A0 to W2 their rows (0: absent), in fp32.

    Grid: (blocks of rows of all matrices,); a program owns a block of rows of one matrix, for all tokens: no sum is
    split over programs. Its order depends on the tiles alone, not on the values of other rows.
    """
    block = tl.program_id(0)
    E0: tl.constexpr = tl.cdiv(A0, BLOCK_J)
    E1: tl.constexpr = E0 + tl.cdiv(A1, BLOCK_J)
    E2: tl.constexpr = E1 + tl.cdiv(A2, BLOCK_J)
    E3: tl.constexpr = E2 + tl.cdiv(W0, BLOCK_J)
    E4: tl.constexpr = E3 + tl.cdiv(W1, BLOCK_J)
    A: tl.constexpr = A0 + A1 + A2
    W: tl.constexpr = W0 + W1 + W2
    if block < E0:
        _rows_times_x(x_ptr, a0_ptr, ranks_ptr, block, T, A0, A, D, BLOCK_T, BLOCK_J, BLOCK_D)
    elif block < E1:
        _rows_times_x(x_ptr, a1_ptr, ranks_ptr + A0, block - E0, T, A1, A, D, BLOCK_T, BLOCK_J, BLOCK_D)
    elif block < E2:
        _rows_times_x(x_ptr, a2_ptr, ranks_ptr + A0 + A1, block - E1, T, A2, A, D, BLOCK_T, BLOCK_J, BLOCK_D)
    elif block < E3:
        _rows_times_x(x_ptr, w0_ptr, logits_ptr, block - E2, T, W0, W, D, BLOCK_T, BLOCK_J, BLOCK_D)
    elif block < E4:
        _rows_times_x(x_ptr, w1_ptr, logits_ptr + W0, block - E3, T, W1, W, D, BLOCK_T, BLOCK_J, BLOCK_D)
    else:
        _rows_times_x(x_ptr, w2_ptr, logits_ptr + W0 + W1, block - E4, T, W2, W, D, BLOCK_T, BLOCK_J, BLOCK_D)


@triton.jit
def few_expand_kernel(
    y_ptr,  # (T, N): read and written
    ranks_ptr,  # (T, C), rows `stride_ranks` apart
    gates_ptr,  # (T, G) fp32
    ids_ptr,  # (T, K) int64
    b_ptr,  # (C, N)
    N, stride_ranks, scaling, C: tl.constexpr, G: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
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
        value = tl.load(ranks_ptr + t * stride_ranks + (c % V if SHARED else c), inside, 0.0).to(tl.float32) * scaling
        if GATED:
            value *= tl.load(gates_ptr + t * G + gate_at, inside, 0.0)
        b = tl.load(b_ptr + c.to(tl.int64)[:, None] * N + n[None, :], inside[:, None] & (n < N)[None, :], 0.0)
        total += tl.sum(value[:, None] * b.to(tl.float32), 0)
    at = t.to(tl.int64) * N + n
    y = tl.load(y_ptr + at, n < N, 0.0).to(tl.float32) + total
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), n < N)
