"""Triton: the middle of a mixture of FFN experts, between its frozen linears. Host side in `fused_ffn.py`.

Tokens are visited in blocks that chose the same set of experts, so that a block multiplies with the ranks of its own
experts only; rows are gathered by token inside the kernels, and each is visited once. Blocks come from
`grouped_kernels.topology_kernel`, with sets in the place of experts.

Legend: T tokens, F hidden features, E experts, K experts of a token (slots, by ascending expert), R rank, C = E*R.

    pre0    (T, F)   pre-activation that is activated: of the gate, or of the only linear
    pre1    (T, F)   pre-activation that multiplies it: of up; absent in a two-layer FFN
    s0, s1  (T, C)   shrunk input of their experts, unscaled, in the compute dtype
    b0, b1  (C, F)   B of their experts, rows `stride_b` apart
    a2      (C, F)   A of the experts of the down-projection
    ids     (T, K)   int32, the experts of a token, ascending
"""

# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl
from triton.language.extra import libdevice

from molora.kernels.grouped_kernels import _tile_tokens


@triton.jit
def _activate(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """EXACT: by the routines that torch uses, so that an expert of zero B gives the frozen FFN to the last bit."""
    if ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "silu":
        if EXACT:
            return libdevice.div_rn(x, 1.0 + libdevice.exp(-x))
        else:
            return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def _slope(x, ACT: tl.constexpr):
    """The derivative of `_activate`."""
    if ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        return s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        s = 1.0 / (1.0 + tl.exp(-2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x)))
        return s + x * s * (1.0 - s) * 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)


@triton.jit
def _round(x, like_ptr):
    """To the compute dtype and back, where the frozen FFN rounds too."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _hidden(p0, p1, like_ptr, GATED: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr):
    h = _round(_activate(p0, ACT, EXACT), like_ptr)
    if GATED:
        h = _round(h * p1, like_ptr)
    return h


@triton.jit
def _ranks(s_ptr, tokens, there, e, r, scale, C, R):
    """(BLOCK_T, BLOCK_R) ranks of expert e of some tokens, times `scale` (a number, or one for each token)."""
    s = tl.load(s_ptr + (tokens * C)[:, None] + (e * R + r)[None, :], there[:, None] & (r < R)[None, :], 0.0)
    return (s.to(tl.float32) * scale).to(s.dtype)


@triton.jit
def _matrix(m_ptr, e, r, f, stride, R, F):
    """(BLOCK_R, BLOCK_F) rows of expert e."""
    rows = (e.to(tl.int64) * R + r) * stride
    return tl.load(m_ptr + rows[:, None] + f[None, :], (r < R)[:, None] & (f < F)[None, :], 0.0)


@triton.jit
def _expand(s_ptr, m_ptr, tokens, there, e, r, f, scale, stride, C, R, F):
    """(BLOCK_T, BLOCK_F) fp32: ranks of expert e times its matrix."""
    return tl.dot(
        _ranks(s_ptr, tokens, there, e, r, scale, C, R), _matrix(m_ptr, e, r, f, stride, R, F), input_precision="ieee"
    )


@triton.jit
def _load(ptr, at, valid):
    return tl.load(ptr + at, valid, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "keys"])
def ffn_fwd_kernel(
    pre0_ptr, pre1_ptr, s0_ptr, s1_ptr, b0_ptr, b1_ptr, a2_ptr, gates_ptr, ids_ptr,
    hidden_ptr,  # (T, F) out
    ranks_ptr,  # (chunks, T, K, R) fp32 out: A of the down-projection times the hidden states of each slot
    order_ptr, offsets_ptr, tiles_ptr,
    T, keys, F, stride_pre0, stride_pre1, stride_b0, stride_b1, scale0, scale1,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr,
    HAS2: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_KR: tl.constexpr,
):  # fmt: skip
    """``hidden = h0 + sum_j gate_j (h_j - h0)`` (RESIDUAL) or ``sum_j gate_j h_j``, and the ranks of the
    down-projection. Grid: (tiles, chunks of F); a program owns its tokens times its features."""
    tile, chunk = tl.program_id(0), tl.program_id(1)
    key = tl.load(tiles_ptr + tile)
    if key < 0:
        return
    tokens, there = _tile_tokens(order_ptr, offsets_ptr, 0, tile, key, T, keys, BLOCK_T)
    first = tl.load(order_ptr + tl.load(offsets_ptr + key)).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    kr = tl.arange(0, BLOCK_KR)
    ranks = tl.zeros((BLOCK_T, BLOCK_KR), tl.float32)
    for start in range(chunk * CHUNK, min(F, (chunk + 1) * CHUNK), BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        valid = there[:, None] & (f < F)[None, :]
        p0 = _load(pre0_ptr, (tokens * stride_pre0)[:, None] + f[None, :], valid)
        p1 = p0
        if GATED:
            p1 = _load(pre1_ptr, (tokens * stride_pre1)[:, None] + f[None, :], valid)
        base = _hidden(p0, p1, hidden_ptr, GATED, ACT, EXACT)
        mixed = base if RESIDUAL else tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for j in tl.static_range(K):
            e = tl.load(ids_ptr + first * K + j)
            gate = tl.load(gates_ptr + tokens * E + e, there, 0.0)[:, None]
            q0 = p0
            q1 = p1
            if HAS0:
                q0 = p0 + _expand(s0_ptr, b0_ptr, tokens, there, e, r, f, scale0, stride_b0, E * R, R, F)
            if HAS1:
                q1 = p1 + _expand(s1_ptr, b1_ptr, tokens, there, e, r, f, scale1, stride_b1, E * R, R, F)
            h = _hidden(q0, q1, hidden_ptr, GATED, ACT, EXACT)
            mixed += gate * (h - base if RESIDUAL else h)
            if HAS2:
                # The matrix of this slot in its own columns: one accumulator for all slots.
                own = kr // BLOCK_R == j
                a2 = tl.load(
                    a2_ptr + ((e * R + kr % BLOCK_R) * F)[None, :] + f[:, None],
                    (own & (kr % BLOCK_R < R))[None, :] & (f < F)[:, None], 0.0,
                )  # fmt: skip
                ranks = tl.dot(h.to(a2.dtype), a2, ranks, input_precision="ieee")
        at = (tokens * F)[:, None] + f[None, :]
        tl.store(hidden_ptr + at, mixed.to(hidden_ptr.dtype.element_ty), valid)
    if HAS2:
        at = ((chunk * T + tokens) * (K * R))[:, None] + (kr // BLOCK_R * R + kr % BLOCK_R)[None, :]
        tl.store(ranks_ptr + at, ranks, there[:, None] & ((kr // BLOCK_R < K) & (kr % BLOCK_R < R))[None, :])


@triton.jit
def _slot_grad(
    p0, p1, dm, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, a2_ptr, tokens, there, e, r, f, gate,
    scale0, scale1, scale2, stride_b0, stride_b1, F, like_ptr,
    E: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Of one slot: hidden state, gradient of what its gate multiplies, and those of its two pre-activations."""
    q0 = p0
    q1 = p1
    if HAS0:
        q0 = p0 + _expand(s0_ptr, b0_ptr, tokens, there, e, r, f, scale0, stride_b0, E * R, R, F)
    if HAS1:
        q1 = p1 + _expand(s1_ptr, b1_ptr, tokens, there, e, r, f, scale1, stride_b1, E * R, R, F)
    grad = dm
    if HAS2:
        grad = dm + _expand(s2_ptr, a2_ptr, tokens, there, e, r, f, scale2, F, E * R, R, F)
    a = _activate(q0, ACT, False)
    slope = _slope(q0, ACT)
    dh = gate * grad
    if GATED:
        return _round(a * q1, like_ptr), grad, dh * q1 * slope, dh * a
    else:
        return _round(a, like_ptr), grad, dh * slope, dh


@triton.jit(do_not_specialize=["T", "keys"])
def ffn_bwd_rows_kernel(
    pre0_ptr, pre1_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, a2_ptr, gates_ptr, ids_ptr,
    dm_ptr,  # (T, F): gradient of hidden
    d0_ptr, d1_ptr,  # (T, F) out: gradients of the pre-activations
    sums_ptr,  # (chunks, T, 2 K R + K) fp32 out: gradients of s0 and s1 of each slot, then of its gate
    order_ptr, offsets_ptr, tiles_ptr,
    T, keys, F, stride_pre0, stride_pre1, stride_b0, stride_b1, scale0, scale1, scale2,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr,
    HAS2: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_KR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients that are sums over features or none: of pre-activations, shrunk inputs and gates. `s2` is the gradient
    of the down-projection's ranks, (T, C). Grid as in the forward."""
    tile, chunk = tl.program_id(0), tl.program_id(1)
    key = tl.load(tiles_ptr + tile)
    if key < 0:
        return
    tokens, there = _tile_tokens(order_ptr, offsets_ptr, 0, tile, key, T, keys, BLOCK_T)
    first = tl.load(order_ptr + tl.load(offsets_ptr + key)).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    kr = tl.arange(0, BLOCK_KR)
    slots = tl.arange(0, BLOCK_K)
    ds0 = tl.zeros((BLOCK_T, BLOCK_KR), tl.float32)
    ds1 = tl.zeros((BLOCK_T, BLOCK_KR), tl.float32)
    dgates = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    left = tl.full((BLOCK_T,), 1.0, tl.float32)
    if RESIDUAL:
        for j in tl.static_range(K):
            left -= tl.load(gates_ptr + tokens * E + tl.load(ids_ptr + first * K + j), there, 0.0)
    for start in range(chunk * CHUNK, min(F, (chunk + 1) * CHUNK), BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        valid = there[:, None] & (f < F)[None, :]
        at = (tokens * F)[:, None] + f[None, :]
        p0 = _load(pre0_ptr, (tokens * stride_pre0)[:, None] + f[None, :], valid)
        p1 = p0
        if GATED:
            p1 = _load(pre1_ptr, (tokens * stride_pre1)[:, None] + f[None, :], valid)
        dm = _load(dm_ptr, at, valid)
        d0 = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        d1 = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        of_base = d0
        if RESIDUAL:
            a = _activate(p0, ACT, False)
            kept = left[:, None] * dm
            if GATED:
                d0 = kept * p1 * _slope(p0, ACT)
                d1 = kept * a
                of_base = dm * _round(a * p1, dm_ptr)
            else:
                d0 = kept * _slope(p0, ACT)
                of_base = dm * _round(a, dm_ptr)
        for j in tl.static_range(K):
            e = tl.load(ids_ptr + first * K + j)
            gate = tl.load(gates_ptr + tokens * E + e, there, 0.0)[:, None]
            h, grad, own0, own1 = _slot_grad(
                p0, p1, dm, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, a2_ptr, tokens, there, e, r, f, gate,
                scale0, scale1, scale2, stride_b0, stride_b1, F, dm_ptr, E, R, GATED, HAS0, HAS1, HAS2, ACT,
            )  # fmt: skip
            d0 += own0
            if GATED:
                d1 += own1
            dgate = tl.sum(h * grad - of_base, 1)
            dgates += tl.where((slots == j)[None, :], dgate[:, None], 0.0)
            own = (kr // BLOCK_R == j) & (kr % BLOCK_R < R)
            row = e * R + kr % BLOCK_R
            if HAS0:
                b = tl.load(b0_ptr + (row * stride_b0)[None, :] + f[:, None], own[None, :] & (f < F)[:, None], 0.0)
                ds0 = tl.dot(own0.to(b.dtype), b, ds0, input_precision="ieee")
            if HAS1:
                b = tl.load(b1_ptr + (row * stride_b1)[None, :] + f[:, None], own[None, :] & (f < F)[:, None], 0.0)
                ds1 = tl.dot(own1.to(b.dtype), b, ds1, input_precision="ieee")
        tl.store(d0_ptr + at, d0.to(d0_ptr.dtype.element_ty), valid)
        if GATED:
            tl.store(d1_ptr + at, d1.to(d1_ptr.dtype.element_ty), valid)
    row = (chunk * T + tokens) * (2 * K * R + K)
    col = kr // BLOCK_R * R + kr % BLOCK_R
    in_ranks = there[:, None] & ((kr // BLOCK_R < K) & (kr % BLOCK_R < R))[None, :]
    if HAS0:
        tl.store(sums_ptr + row[:, None] + col[None, :], ds0 * scale0, in_ranks)
    if HAS1:
        tl.store(sums_ptr + row[:, None] + (K * R + col)[None, :], ds1 * scale1, in_ranks)
    tl.store(sums_ptr + row[:, None] + (2 * K * R + slots)[None, :], dgates, there[:, None] & (slots < K)[None, :])


@triton.jit(do_not_specialize=["T", "keys", "tiles"])
def ffn_bwd_experts_kernel(
    pre0_ptr, pre1_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, a2_ptr, gates_ptr, ids_ptr, dm_ptr,
    db0_ptr, db1_ptr, da2_ptr,  # (C, F) out
    order_ptr, offsets_ptr, tiles_ptr,
    T, keys, tiles, F, stride_pre0, stride_pre1, stride_b0, stride_b1, scale0, scale1, scale2,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr,
    HAS2: tl.constexpr, ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of the experts' matrices. Grid: (E * blocks of F,), experts fastest, which share what they read; a
    program owns one expert's ranks times its features, and walks over the tiles whose tokens chose it."""
    expert = tl.program_id(0) % E
    f = (tl.program_id(0) // E) * BLOCK_F + tl.arange(0, BLOCK_F)
    r = tl.arange(0, BLOCK_R)
    db0 = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    db1 = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    da2 = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for tile in range(0, tiles):
        key = tl.load(tiles_ptr + tile)
        chosen = 0
        if key >= 0:
            first = tl.load(order_ptr + tl.load(offsets_ptr + key)).to(tl.int64)
            for j in tl.static_range(K):
                chosen += (tl.load(ids_ptr + first * K + j) == expert).to(tl.int32)
        if chosen > 0:
            tokens, there = _tile_tokens(order_ptr, offsets_ptr, 0, tile, key, T, keys, BLOCK_T)
            valid = there[:, None] & (f < F)[None, :]
            p0 = _load(pre0_ptr, (tokens * stride_pre0)[:, None] + f[None, :], valid)
            p1 = p0
            if GATED:
                p1 = _load(pre1_ptr, (tokens * stride_pre1)[:, None] + f[None, :], valid)
            dm = _load(dm_ptr, (tokens * F)[:, None] + f[None, :], valid)
            gate = tl.load(gates_ptr + tokens * E + expert, there, 0.0)[:, None]
            h, grad, own0, own1 = _slot_grad(
                p0, p1, dm, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, a2_ptr, tokens, there, expert, r, f, gate,
                scale0, scale1, scale2, stride_b0, stride_b1, F, dm_ptr, E, R, GATED, HAS0, HAS1, HAS2, ACT,
            )  # fmt: skip
            if HAS0:
                s = _ranks(s0_ptr, tokens, there, expert, r, scale0, E * R, R)
                db0 = tl.dot(tl.trans(s), own0.to(s.dtype), db0, input_precision="ieee")
            if HAS1:
                s = _ranks(s1_ptr, tokens, there, expert, r, scale1, E * R, R)
                db1 = tl.dot(tl.trans(s), own1.to(s.dtype), db1, input_precision="ieee")
            if HAS2:
                s = _ranks(s2_ptr, tokens, there, expert, r, scale2 * gate, E * R, R)
                da2 = tl.dot(tl.trans(s), h.to(s.dtype), da2, input_precision="ieee")
    at = ((expert.to(tl.int64) * R + r) * F)[:, None] + f[None, :]
    valid = (r < R)[:, None] & (f < F)[None, :]
    if HAS0:
        tl.store(db0_ptr + at, db0.to(db0_ptr.dtype.element_ty), valid)
    if HAS1:
        tl.store(db1_ptr + at, db1.to(db1_ptr.dtype.element_ty), valid)
    if HAS2:
        tl.store(da2_ptr + at, da2.to(da2_ptr.dtype.element_ty), valid)
