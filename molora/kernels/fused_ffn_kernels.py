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
def _inverse(x, FAST: tl.constexpr):
    """``1 / x`` for x >= 1. FAST: by one instruction, to an ulp or two of fp32; a division takes ten."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _activate(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """The activation and its derivative, which share what is expensive."""
    if ACT == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        s = _inverse(1.0 + tl.exp(-x), FAST)
        a = x * s
        return a, s + a * (1.0 - s)
    elif ACT == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # the sigmoid of twice the tanh's argument
        s = _inverse(1.0 + tl.exp(-inner), FAST)
        a = x * s
        return a, s + a * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def _frozen(p0, p1, like_ptr, GATED: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr):
    """The hidden state of the frozen FFN, rounded where the FFN rounds, and the same unrounded.

    FAST: on a GPU, by the routines that torch's silu uses there, for the same last bit.
    """
    if ACT == "silu" and FAST:
        a = libdevice.div_rn(p0, 1.0 + libdevice.exp(-p0))
    else:
        a = _activate(p0, ACT, False)[0]
    rounded = a.to(like_ptr.dtype.element_ty).to(tl.float32)
    if GATED:
        return (rounded * p1).to(like_ptr.dtype.element_ty).to(tl.float32), a * p1
    else:
        return rounded, a


@triton.jit
def _slot_columns(ids_ptr, first, K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_KR: tl.constexpr):
    """The ranks of all slots of a block side by side: (slot, column among the C ranks of all experts, is there)."""
    kr = tl.arange(0, BLOCK_KR)
    slot, r = kr // BLOCK_R, kr % BLOCK_R
    there = (slot < K) & (r < R)
    return slot, tl.load(ids_ptr + first * K + slot, there, 0) * R + r, there


@triton.jit
def _ranks(s_ptr, tokens, there, columns, in_columns, scale, C):
    """(BLOCK_T, .) ranks of some tokens, times `scale` (a number, or one for each token)."""
    s = tl.load(s_ptr + (tokens * C)[:, None] + columns[None, :], there[:, None] & in_columns[None, :], 0.0)
    return (s.to(tl.float32) * scale).to(s.dtype)


@triton.jit
def _matrix(m_ptr, rows, in_rows, f, stride, F):
    """(., BLOCK_F) rows of a matrix (C, F)."""
    return tl.load(m_ptr + (rows.to(tl.int64) * stride)[:, None] + f[None, :], in_rows[:, None] & (f < F)[None, :], 0.0)


@triton.jit
def _load(ptr, at, valid):
    return tl.load(ptr + at, valid, 0.0).to(tl.float32)


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "keys"])
def ffn_fwd_kernel(
    pre0_ptr, pre1_ptr, s0_ptr, s1_ptr, b0_ptr, b1_ptr, a2_ptr, gates_ptr, ids_ptr,
    base_ptr,  # (T, F): the frozen hidden state, where WITH_BASE
    hidden_ptr,  # (T, F) out
    ranks_ptr,  # (chunks, T, K, R) fp32 out: A of the down-projection times the hidden states of each slot
    order_ptr, offsets_ptr, tiles_ptr,
    T, keys, F, stride_pre0, stride_pre1, stride_b0, stride_b1, scale0, scale1,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr,
    HAS2: tl.constexpr, RESIDUAL: tl.constexpr, WITH_BASE: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_KR: tl.constexpr,
):  # fmt: skip
    """``hidden = h0 + sum_j gate_j (h_j - h0)`` (RESIDUAL) or ``sum_j gate_j h_j``, and the ranks of the
    down-projection. Grid: (tiles, chunks of F); a program owns its tokens times its features.

    The ranks of all slots lie side by side, and a slot loads its matrix into its own rows and zeros into the others: so
    the ranks stay in registers during the loop, and one accumulator serves all slots.
    """
    tile, chunk = tl.program_id(0), tl.program_id(1)
    key = tl.load(tiles_ptr + tile)
    if key < 0:
        return
    tokens, there = _tile_tokens(order_ptr, offsets_ptr, 0, tile, key, T, keys, BLOCK_T)
    first = tl.load(order_ptr + tl.load(offsets_ptr + key)).to(tl.int64)
    slot, columns, in_columns = _slot_columns(ids_ptr, first, K, R, BLOCK_R, BLOCK_KR)
    if HAS0:
        s0 = _ranks(s0_ptr, tokens, there, columns, in_columns, scale0, E * R)
    if HAS1:
        s1 = _ranks(s1_ptr, tokens, there, columns, in_columns, scale1, E * R)
    ranks = tl.zeros((BLOCK_T, BLOCK_KR), tl.float32)
    for start in range(chunk * CHUNK, min(F, (chunk + 1) * CHUNK), BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        valid = there[:, None] & (f < F)[None, :]
        p0 = _load(pre0_ptr, (tokens * stride_pre0)[:, None] + f[None, :], valid)
        p1 = p0
        if GATED:
            p1 = _load(pre1_ptr, (tokens * stride_pre1)[:, None] + f[None, :], valid)
        if RESIDUAL:
            # Where experts add nothing, the differences below are zero or far below the last bit of the rounded state.
            if WITH_BASE:
                mixed = _load(base_ptr, (tokens * F)[:, None] + f[None, :], valid)
                base = _activate(p0, ACT, FAST)[0]
                if GATED:
                    base = base * p1
            else:
                mixed, base = _frozen(p0, p1, hidden_ptr, GATED, ACT, FAST)
        else:
            mixed = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for j in tl.static_range(K):
            own = in_columns & (slot == j)
            gate = tl.load(gates_ptr + tokens * E + tl.load(ids_ptr + first * K + j), there, 0.0)[:, None]
            q0 = p0
            q1 = p1
            if HAS0:
                q0 = _dot(s0, _matrix(b0_ptr, columns, own, f, stride_b0, F), p0)
            if HAS1:
                q1 = _dot(s1, _matrix(b1_ptr, columns, own, f, stride_b1, F), p1)
            h = _activate(q0, ACT, FAST)[0]
            if GATED:
                h = h * q1
            mixed += gate * (h - base if RESIDUAL else h)
            if HAS2:
                a2 = _matrix(a2_ptr, columns, own, f, F, F)
                ranks = _dot(h.to(a2.dtype), tl.trans(a2), ranks)
        tl.store(hidden_ptr + (tokens * F)[:, None] + f[None, :], mixed.to(hidden_ptr.dtype.element_ty), valid)
    if HAS2:
        kr = tl.arange(0, BLOCK_KR)
        at = ((chunk * T + tokens) * (K * R))[:, None] + (kr // BLOCK_R * R + kr % BLOCK_R)[None, :]
        tl.store(ranks_ptr + at, ranks, there[:, None] & in_columns[None, :])


@triton.jit
def _slot_grad(q0, q1, grad, gate, GATED: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr):
    """Of one slot: its hidden state, and the gradients of its two pre-activations from that of its gated hidden."""
    a, slope = _activate(q0, ACT, FAST)
    dh = gate * grad
    if GATED:
        return a * q1, dh * q1 * slope, dh * a
    else:
        return a, dh * slope, dh


@triton.jit(do_not_specialize=["T", "keys"])
def ffn_bwd_rows_kernel(
    pre0_ptr, pre1_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, a2_ptr, gates_ptr, ids_ptr,
    dm_ptr,  # (T, F): gradient of hidden
    d0_ptr, d1_ptr,  # (T, F) out: gradients of the pre-activations
    sums_ptr,  # (chunks, T, 2 K R + K) fp32 out: gradients of s0 and s1 of each slot, then of its gate
    order_ptr, offsets_ptr, tiles_ptr,
    T, keys, F, stride_pre0, stride_pre1, stride_b0, stride_b1, scale0, scale1, scale2,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr,
    HAS2: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_KR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients that are sums over features or none: of pre-activations, shrunk inputs and gates. `s2` is the gradient
    of the down-projection's ranks, (T, C). In residual form the gates sum to one: the frozen FFN passes no gradient on,
    and its part in the gradient of the gates, which all gates of a token share, is left out. Grid as in the forward."""
    tile, chunk = tl.program_id(0), tl.program_id(1)
    key = tl.load(tiles_ptr + tile)
    if key < 0:
        return
    tokens, there = _tile_tokens(order_ptr, offsets_ptr, 0, tile, key, T, keys, BLOCK_T)
    first = tl.load(order_ptr + tl.load(offsets_ptr + key)).to(tl.int64)
    slot, columns, in_columns = _slot_columns(ids_ptr, first, K, R, BLOCK_R, BLOCK_KR)
    if HAS0:
        s0 = _ranks(s0_ptr, tokens, there, columns, in_columns, scale0, E * R)
    if HAS1:
        s1 = _ranks(s1_ptr, tokens, there, columns, in_columns, scale1, E * R)
    if HAS2:
        s2 = _ranks(s2_ptr, tokens, there, columns, in_columns, scale2, E * R)
    slots = tl.arange(0, BLOCK_K)
    ds0 = tl.zeros((BLOCK_T, BLOCK_KR), tl.float32)
    ds1 = tl.zeros((BLOCK_T, BLOCK_KR), tl.float32)
    dgates = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
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
        for j in tl.static_range(K):
            own = in_columns & (slot == j)
            gate = tl.load(gates_ptr + tokens * E + tl.load(ids_ptr + first * K + j), there, 0.0)[:, None]
            q0 = p0
            q1 = p1
            grad = dm
            if HAS0:
                b0 = _matrix(b0_ptr, columns, own, f, stride_b0, F)
                q0 = _dot(s0, b0, p0)
            if HAS1:
                b1 = _matrix(b1_ptr, columns, own, f, stride_b1, F)
                q1 = _dot(s1, b1, p1)
            if HAS2:
                grad = _dot(s2, _matrix(a2_ptr, columns, own, f, F, F), dm)
            h, own0, own1 = _slot_grad(q0, q1, grad, gate, GATED, ACT, FAST)
            dgates += tl.where((slots == j)[None, :], tl.sum(h * grad, 1)[:, None], 0.0)
            d0 += own0
            if GATED:
                d1 += own1
            if HAS0:
                ds0 = _dot(own0.to(b0.dtype), tl.trans(b0), ds0)
            if HAS1:
                ds1 = _dot(own1.to(b1.dtype), tl.trans(b1), ds1)
        tl.store(d0_ptr + at, d0.to(d0_ptr.dtype.element_ty), valid)
        if GATED:
            tl.store(d1_ptr + at, d1.to(d1_ptr.dtype.element_ty), valid)
    kr = tl.arange(0, BLOCK_KR)
    row = (chunk * T + tokens) * (2 * K * R + K)
    col = kr // BLOCK_R * R + kr % BLOCK_R
    in_ranks = there[:, None] & in_columns[None, :]
    if HAS0:
        tl.store(sums_ptr + row[:, None] + col[None, :], ds0 * scale0, in_ranks)
    if HAS1:
        tl.store(sums_ptr + row[:, None] + (K * R + col)[None, :], ds1 * scale1, in_ranks)
    tl.store(sums_ptr + row[:, None] + (2 * K * R + slots)[None, :], dgates, there[:, None] & (slots < K)[None, :])


@triton.jit(do_not_specialize=["T"])
def ffn_bwd_experts_kernel(
    pre0_ptr, pre1_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, a2_ptr, gates_ptr, dm_ptr,
    db0_ptr, db1_ptr, da2_ptr,  # (C, F) out
    order_ptr, offsets_ptr,  # (K, T), (K, E+1): tokens by their expert in each slot
    T, F, stride_pre0, stride_pre1, stride_b0, stride_b1, scale0, scale1, scale2,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, HAS0: tl.constexpr, HAS1: tl.constexpr,
    HAS2: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of the experts' matrices. Grid: (E * blocks of F,), experts fastest, which share what they read; a
    program owns one expert's ranks times its features, and walks over the tokens that chose it, slot by slot."""
    expert = tl.program_id(0) % E
    f = (tl.program_id(0) // E) * BLOCK_F + tl.arange(0, BLOCK_F)
    r = tl.arange(0, BLOCK_R)
    db0 = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    db1 = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    da2 = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    columns = expert * R + r
    if HAS0:
        b0 = _matrix(b0_ptr, columns, r < R, f, stride_b0, F)
    if HAS1:
        b1 = _matrix(b1_ptr, columns, r < R, f, stride_b1, F)
    if HAS2:
        a2 = _matrix(a2_ptr, columns, r < R, f, F, F)
    for j in range(K):
        lo = tl.load(offsets_ptr + j * (E + 1) + expert)
        hi = tl.load(offsets_ptr + j * (E + 1) + expert + 1)
        for start in range(lo, hi, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            there = row < hi
            tokens = tl.load(order_ptr + j * T + row, there, 0).to(tl.int64)
            valid = there[:, None] & (f < F)[None, :]
            p0 = _load(pre0_ptr, (tokens * stride_pre0)[:, None] + f[None, :], valid)
            p1 = p0
            if GATED:
                p1 = _load(pre1_ptr, (tokens * stride_pre1)[:, None] + f[None, :], valid)
            dm = _load(dm_ptr, (tokens * F)[:, None] + f[None, :], valid)
            gate = tl.load(gates_ptr + tokens * E + expert, there, 0.0)[:, None]
            q0 = p0
            q1 = p1
            grad = dm
            if HAS0:
                s0 = _ranks(s0_ptr, tokens, there, columns, r < R, scale0, E * R)
                q0 = _dot(s0, b0, p0)
            if HAS1:
                s1 = _ranks(s1_ptr, tokens, there, columns, r < R, scale1, E * R)
                q1 = _dot(s1, b1, p1)
            if HAS2:
                grad = _dot(_ranks(s2_ptr, tokens, there, columns, r < R, scale2, E * R), a2, dm)
            h, own0, own1 = _slot_grad(q0, q1, grad, gate, GATED, ACT, FAST)
            if HAS0:
                db0 = _dot(tl.trans(s0), own0.to(s0.dtype), db0)
            if HAS1:
                db1 = _dot(tl.trans(s1), own1.to(s1.dtype), db1)
            if HAS2:
                s2 = _ranks(s2_ptr, tokens, there, columns, r < R, scale2 * gate, E * R)
                da2 = _dot(tl.trans(s2), h.to(s2.dtype), da2)
    at = ((expert.to(tl.int64) * R + r) * F)[:, None] + f[None, :]
    valid = (r < R)[:, None] & (f < F)[None, :]
    if HAS0:
        tl.store(db0_ptr + at, db0.to(db0_ptr.dtype.element_ty), valid)
    if HAS1:
        tl.store(db1_ptr + at, db1.to(db1_ptr.dtype.element_ty), valid)
    if HAS2:
        tl.store(da2_ptr + at, da2.to(da2_ptr.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["T", "chunks"])
def collect_kernel(
    partial_ptr,  # (chunks, T, .) fp32: of each token the values (K, R) of its slots, `stride_t` apart
    ids_ptr, gates_ptr,
    out_ptr,  # (T, E*R) out
    T, chunks, stride_chunk, stride_t, scale,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, GATED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the chunks in order and puts each slot's values under its expert, times scale and gate; zero elsewhere.

    Grid: (blocks of tokens, blocks of columns); a program owns one tile.
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    e, r = c // R, c % R
    inside = (t < T) & (c < E * R)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for j in tl.static_range(K):
        own = inside & (tl.load(ids_ptr + t * K + j, t < T, -1) == e)
        for chunk in range(chunks):
            total += tl.load(partial_ptr + chunk * stride_chunk + t * stride_t + j * R + r, own, 0.0)
    if GATED:
        total *= tl.load(gates_ptr + t * E + e, inside, 0.0)
    tl.store(out_ptr + t * (E * R) + c, (total * scale).to(out_ptr.dtype.element_ty), inside)
