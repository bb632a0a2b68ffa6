"""Triton: the gates as a mask on the ranks, forward and backward. Host side in `ranks.py`.

Legend: T tokens, G gates of a token, V consecutive ranks that share a gate, C = G*V ranks in all. Where experts share
one A there are only V ranks of the input, and every gate multiplies all of them.
"""

# mypy: disallow-incomplete-defs=False
# Only the constexpr parameters of a kernel are annotated, which Triton needs; the others have no Python type.

import triton
import triton.language as tl


@triton.jit
def gate_fwd_kernel(
    shrunk_ptr,  # (SPLITS, T, C or V), any float: the parts of a sum
    gates_ptr,  # (T, G) fp32
    ranks_ptr,  # (T, C) out
    kept_ptr,  # (T, C or V) out: shrunk in the compute dtype, for the backward
    T,
    stride_s,
    stride_split,
    scaling,
    SPLITS: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``ranks = scaling * gate * shrunk``. Grid: (blocks of tokens, blocks of ranks); a program owns one tile."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (t < T) & (c < G * V)
    width = V if SHARED else G * V
    s = c % V if SHARED else c
    shrunk = tl.load(shrunk_ptr + t * stride_s + s, inside, 0.0).to(tl.float32)
    for part in tl.static_range(1, SPLITS):
        shrunk += tl.load(shrunk_ptr + part * stride_split + t * stride_s + s, inside, 0.0).to(tl.float32)
    ranks = shrunk * scaling
    if GATED:
        ranks = ranks * tl.load(gates_ptr + t * G + c // V, inside, 0.0).to(tl.float32)
    tl.store(ranks_ptr + t * (G * V) + c, ranks.to(ranks_ptr.dtype.element_ty), inside)
    if KEEP:
        tl.store(kept_ptr + t * width + s, shrunk.to(kept_ptr.dtype.element_ty), inside & (c < width))


@triton.jit
def gate_bwd_kernel(
    grad_ranks_ptr,  # (T, C) compute dtype: dY B^T
    shrunk_ptr,  # (T, C or V)
    gates_ptr,  # (T, G) fp32
    ranks_ptr,  # (T, C) out: scaling * gate * shrunk, again
    grad_shrunk_ptr,  # (T, C or V) out, any float
    grad_gates_ptr,  # (T, G) fp32 out
    T,
    scaling,
    G: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``grad_gate = scaling * <grad_ranks, shrunk>`` over the ranks of a gate, and ``grad_shrunk`` and ``ranks``.

    Grid: (blocks of tokens,); a program owns all ranks of its tokens and walks over the gates in blocks, in order.
    """
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    t = rows[:, :, None]
    v = tl.arange(0, BLOCK_V)[None, None, :]
    total = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for first in range(0, G, BLOCK_G):
        gates = first + tl.arange(0, BLOCK_G)[None, :]
        g = gates[:, :, None]
        inside = (t < T) & (g < G) & (v < V)
        c = t * (G * V) + g * V + v
        grad = scaling * tl.load(grad_ranks_ptr + c, inside, 0.0).to(tl.float32)
        place = t * V + v + 0 * g if SHARED else c
        shrunk = tl.load(shrunk_ptr + place, inside, 0.0).to(tl.float32)
        gated = shrunk
        if GATED:
            # d loss / d gate in rank space: V products per gate, and no division by the gate.
            at = rows * G + gates
            in_gates = (rows < T) & (gates < G)
            tl.store(grad_gates_ptr + at, tl.sum(grad * shrunk, 2), in_gates)
            gate = tl.load(gates_ptr + at, in_gates, 0.0).to(tl.float32)[:, :, None]
            gated = gate * shrunk
            grad = gate * grad
        tl.store(ranks_ptr + c, (scaling * gated).to(ranks_ptr.dtype.element_ty), inside)
        if SHARED:
            total += tl.sum(grad, 1)
        else:
            tl.store(grad_shrunk_ptr + place, grad.to(grad_shrunk_ptr.dtype.element_ty), inside)
    if SHARED:
        cols = tl.arange(0, BLOCK_V)[None, :]
        total = total.to(grad_shrunk_ptr.dtype.element_ty)
        tl.store(grad_shrunk_ptr + rows * V + cols, total, (rows < T) & (cols < V))
