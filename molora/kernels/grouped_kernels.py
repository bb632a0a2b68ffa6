"""Triton kernels of the grouped mixture: blocks of tokens times the ranks of one expert.

Rows of x, y and their gradients are read and written by token index inside the kernels, so no permuted or padded copy
of them exists. Every element has one writer per launch: no atomics, and the same bits in every run. All products
accumulate in fp32.

Legend: T tokens, E experts, K top-k (a "slot" is one of a token's K choices), R rank of one expert, N features of the
matrix at hand (D, those of the input, or O, those of the output). The host is `grouped.py`; it owns the launch grids.

    array         shape       meaning
    order         (K, T)      order[j] lists the tokens sorted by their expert of slot j, stable
    offsets       (K, E+1)    the tokens of expert e in slot j are order[j, offsets[j, e] : offsets[j, e+1]]
    tile_experts  (K, tiles)  the expert of a tile of slot j, -1 for a tile without tokens

Tile i of expert e starts at token offsets[j, e] + (i - offsets[j, e] // BLOCK_T - e) * BLOCK_T of order[j]: an expert
with n tokens after s others fits into tiles s // BLOCK_T + e to (s + n) // BLOCK_T + e, which no other expert has. So
the number of tiles is static, T // BLOCK_T + E, and an expert places its tiles without waiting for the others.
"""

# mypy: disallow-incomplete-defs=False
# Only the constexpr parameters of a kernel are annotated, which Triton needs; the others have no Python type.

import triton
import triton.language as tl


# Sizes that change from call to call must not cause compilation anew.
@triton.jit(do_not_specialize=["T", "tiles"])
def topology_kernel(
    ids_ptr, order_ptr, offsets_ptr, tile_experts_ptr, T, tiles, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Fills the index arrays from the choices ids (T, K), in place of a sort.

    Grid (E, K). One program owns an expert in a slot: it counts the tokens of the experts before, then lists its own.
    """
    e = tl.program_id(0)
    slot = tl.program_id(1)
    E = tl.num_programs(0)
    K = tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    below = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, T, BLOCK):
        t = start + lane
        ids = tl.load(ids_ptr + t * K + slot, mask=t < T, other=E)
        below += (ids < e).to(tl.int32)
    lo = tl.sum(below, 0)
    hi = lo
    for start in range(0, T, BLOCK):
        t = start + lane
        mine = (tl.load(ids_ptr + t * K + slot, mask=t < T, other=E) == e).to(tl.int32)
        tl.store(order_ptr + slot * T + hi + tl.cumsum(mine, 0) - 1, t, mask=mine > 0)
        hi += tl.sum(mine, 0)

    tl.store(offsets_ptr + slot * (E + 1) + e, lo)
    if e == E - 1:
        tl.store(offsets_ptr + slot * (E + 1) + E, hi)
    first = lo // BLOCK_T + e
    last = hi // BLOCK_T + e
    for start in range(first, last + 1, BLOCK):
        tile = start + lane
        holds_tokens = (tile - first) * BLOCK_T < hi - lo
        tl.store(tile_experts_ptr + slot * tiles + tile, tl.where(holds_tokens, e, -1), mask=tile <= last)


@triton.jit
def _tile_tokens(order_ptr, offsets_ptr, slot, tile, e, T, E, BLOCK_T: tl.constexpr):
    """The tokens of a tile, int64 because a token times a row stride may exceed 2^31, and which of them are there."""
    lo = tl.load(offsets_ptr + slot * (E + 1) + e)
    hi = tl.load(offsets_ptr + slot * (E + 1) + e + 1)
    row = lo + (tile - lo // BLOCK_T - e) * BLOCK_T + tl.arange(0, BLOCK_T)
    return tl.load(order_ptr + slot * T + row, mask=row < hi, other=0).to(tl.int64), row < hi


@triton.jit
def _gated_ranks(q_ptr, gates_ptr, tokens, there, r, slot, e, scaling, E, K, R):
    """Ranks r of the tokens in one slot times gate and scaling, fp32; zero for tokens that are not there."""
    gate = tl.load(gates_ptr + tokens * E + e, mask=there, other=0.0).to(tl.float32) * scaling
    q = tl.load(
        q_ptr + ((tokens * K + slot) * R)[:, None] + r[None, :], mask=there[:, None] & (r < R)[None, :], other=0.0
    )
    return q * gate[:, None]


@triton.jit(do_not_specialize=["T"])
def gather_shrink_kernel(
    x_ptr, m_ptr, p_ptr, s_ptr, gates_grad_ptr, order_ptr, offsets_ptr, tile_experts_ptr,
    T, E, R, N, stride_x, scaling,
    WITH_GATES_GRAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """P[t, slot] = x[t] M_e^T for x (T, N) with row stride `stride_x`, M (E, R, N) and P (T, K, R) in fp32.

    WITH_GATES_GRAD also writes gates_grad[t, e] = scaling <P[t, slot], S[t, slot]> of S (T, K, R), into (T, E).
    Grid (tiles, K). One program owns a tile of tokens of one expert in one slot, with all ranks.
    """
    tile = tl.program_id(0)
    slot = tl.program_id(1)
    K = tl.num_programs(1)
    e = tl.load(tile_experts_ptr + slot * tl.num_programs(0) + tile)
    if e < 0:
        return
    tokens, there = _tile_tokens(order_ptr, offsets_ptr, slot, tile, e, T, E, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    lane = tl.arange(0, BLOCK_N)
    x_rows = x_ptr + tokens * stride_x
    m_rows = m_ptr + (e.to(tl.int64) * R + r) * N
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + lane
        x = tl.load(x_rows[:, None] + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0)
        m = tl.load(m_rows[None, :] + n[:, None], mask=(r < R)[None, :] & (n < N)[:, None], other=0.0)
        # "ieee" is about fp32 inputs alone, which would lose 13 bits in TF32.
        acc = tl.dot(x, m, acc, input_precision="ieee")
    at = ((tokens * K + slot) * R)[:, None] + r[None, :]
    valid = there[:, None] & (r < R)[None, :]
    tl.store(p_ptr + at, acc, mask=valid)
    if WITH_GATES_GRAD:
        s = tl.load(s_ptr + at, mask=valid, other=0.0)
        tl.store(gates_grad_ptr + tokens * E + e, tl.sum(acc * s, 1) * scaling, mask=there)


@triton.jit(do_not_specialize=["T", "tiles", "slot"])
def scatter_expand_kernel(
    base_ptr, y_ptr, q_ptr, gates_ptr, m_ptr, order_ptr, offsets_ptr, tile_experts_ptr,
    slot, tiles, T, E, K, R, N, stride_base, stride_y, scaling,
    WITH_BASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """y[t] = base[t] + scaling gates[t, e] Q[t, slot] M_e for one slot; y and base are (T, N), base may be y.

    Q (T, K, R) in fp32 is rounded to the dtype of M (E, R, N) after the gate; the sum to that of y. Without WITH_BASE
    the base is zero. Grid (tiles * ceil(N / BLOCK_N)), columns fastest, so that the programs of a row run together. One
    program owns a tile of tokens of one expert times a block of columns; a token is in one tile of the slot.
    """
    columns = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // columns
    e = tl.load(tile_experts_ptr + slot * tiles + tile)
    if e < 0:
        return
    tokens, there = _tile_tokens(order_ptr, offsets_ptr, slot, tile, e, T, E, BLOCK_T)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        m_rows = m_ptr + (e.to(tl.int64) * R + r) * N
        m = tl.load(m_rows[:, None] + n[None, :], mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
        q = _gated_ranks(q_ptr, gates_ptr, tokens, there, r, slot, e, scaling, E, K, R)
        y = tl.dot(q.to(m.dtype), m, y, input_precision="ieee")
    valid = there[:, None] & (n < N)[None, :]
    if WITH_BASE:
        y += tl.load(base_ptr + (tokens * stride_base)[:, None] + n[None, :], mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + (tokens * stride_y)[:, None] + n[None, :], y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["T"])
def group_wgrad_kernel(
    z_ptr, m_grad_ptr, q_ptr, gates_ptr, order_ptr, offsets_ptr,
    T, K, R, N, stride_z, scaling,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """dM_e = sum over the tokens t and slots of e of (scaling gates[t, e] Q[t, slot])^T z[t], zero without tokens.

    Q (T, K, R) in fp32 is rounded to the dtype of z (T, N) after the gate; the sum to that of dM (E, R, N).
    Grid (E, ceil(N / BLOCK_N), ceil(R / BLOCK_R)). One program owns a block of ranks of an expert times one of columns.
    """
    e = tl.program_id(0)
    E = tl.num_programs(0)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for slot in range(0, K):
        lo = tl.load(offsets_ptr + slot * (E + 1) + e)
        hi = tl.load(offsets_ptr + slot * (E + 1) + e + 1)
        for start in range(lo, hi, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            there = row < hi
            tokens = tl.load(order_ptr + slot * T + row, mask=there, other=0).to(tl.int64)
            z = tl.load(
                z_ptr + (tokens * stride_z)[:, None] + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0
            )
            q = _gated_ranks(q_ptr, gates_ptr, tokens, there, r, slot, e, scaling, E, K, R)
            acc = tl.dot(tl.trans(q.to(z.dtype)), z, acc, input_precision="ieee")
    at = ((e.to(tl.int64) * R + r) * N)[:, None] + n[None, :]
    tl.store(m_grad_ptr + at, acc.to(m_grad_ptr.dtype.element_ty), mask=(r < R)[:, None] & (n < N)[None, :])
