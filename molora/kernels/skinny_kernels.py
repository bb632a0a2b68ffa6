"""Triton: adding a product of small inner size to a large matrix, in one pass over it. Host side in `skinny.py`."""

# mypy: disallow-incomplete-defs=False
# Only the constexpr parameters of a kernel are annotated, which Triton needs; the others have no Python type.

import triton
import triton.language as tl


@triton.jit
def _add_part(
    total, p_ptr, m_ptr, t, n, first, K, N, stride_p, T, WIDTH: tl.constexpr, EVEN: tl.constexpr, IEEE: tl.constexpr
):
    k = first + tl.arange(0, WIDTH)
    if EVEN:
        p = tl.load(p_ptr + t.to(tl.int64)[:, None] * stride_p + k[None, :])
        m = tl.load(m_ptr + k.to(tl.int64)[:, None] * N + n[None, :])
    else:
        p = tl.load(p_ptr + t.to(tl.int64)[:, None] * stride_p + k[None, :], (t < T)[:, None] & (k < K)[None, :], 0.0)
        m = tl.load(m_ptr + k.to(tl.int64)[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :], 0.0)
    return tl.dot(p, m.to(p.dtype), total, input_precision="ieee" if IEEE else "tf32")


@triton.jit
def add_product_kernel(
    y_ptr,  # (T, N): read and written
    p_ptr,  # (T, K)
    m_ptr,  # (K, N), any float: multiplied in the dtype of p
    T,
    N,
    stride_p,
    K: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y += p m``, accumulated in fp32 and rounded once. Grid: (tiles of y,); neighbours share rows of p.

    The inner size is taken in steps of BLOCK_K, and what is left (fewer than BLOCK_K) in one step of width TAIL. With
    EVEN, T and N are multiples of the tile, and only the tail is masked.
    """
    columns = tl.cdiv(N, BLOCK_N)
    t = (tl.program_id(0) // columns) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = t.to(tl.int64)[:, None] * N + n[None, :]
    inside = (t < T)[:, None] & (n < N)[None, :]
    # y first: what waits for it is hidden by the products.
    y = tl.load(y_ptr + at) if EVEN else tl.load(y_ptr + at, inside, 0.0)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in tl.static_range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):
        total = _add_part(total, p_ptr, m_ptr, t, n, first, K, N, stride_p, T, BLOCK_K, EVEN, IEEE)
    if TAIL:
        first = K // BLOCK_K * BLOCK_K
        total = _add_part(total, p_ptr, m_ptr, t, n, first, K, N, stride_p, T, TAIL, False, IEEE)
    y = (y.to(tl.float32) + total).to(y_ptr.dtype.element_ty)
    if EVEN:
        tl.store(y_ptr + at, y)
    else:
        tl.store(y_ptr + at, y, inside)
