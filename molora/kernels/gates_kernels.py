"""Triton: from router logits to gates, choices and statistics, and back. Host side in `gates.py`.

Legend: T tokens, E gates of a token (experts, or groups of ranks), K chosen, S statistics.

Statistics (S,), first as sums over the tokens of one program, then as means:

| column | what |
|---|---|
| 0, 1 | tokens that count, all tokens |
| 2, 3, 4 | entropy of the probabilities, entropy of the gates, share of the largest gate |
| 5 .. 5+E, .. 5+2E | choices of each expert, gates of each expert |
| top-k only: 5+2E, 6+2E | square of the logsumexp, zero (the place of a task loss) |
| top-k only: 7+2E .. 7+4E | choices and probabilities again, with the weights of the losses |
"""

# mypy: disallow-incomplete-defs=False
# Only the constexpr parameters of a kernel are annotated, which Triton needs; the others have no Python type.

import triton
import triton.language as tl


@triton.jit
def _choose(scores, cols, ids_ptr, in_rows, E: tl.constexpr, K: tl.constexpr):
    """One where a column is among the K largest of its row, ties to the lower; writes them in descending order."""
    chosen = tl.zeros_like(scores)
    for j in tl.static_range(K):
        # NaN may make a padding column the largest: no kernel may read there.
        best = tl.minimum(tl.argmax(scores, axis=1, tie_break_left=True), E - 1)
        hit = cols == best[:, None]
        chosen = tl.where(hit, 1.0, chosen)
        scores = tl.where(hit, float("-inf"), scores)
        tl.store(ids_ptr + j, best.to(tl.int64), in_rows)
    return chosen


@triton.jit
def _xlogx(p):
    return tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)


@triton.jit
def add_usage(sums_ptr, cols, inside, weight, one, probs, gates, chosen, E: tl.constexpr, ENTROPY: tl.constexpr):
    """The common statistics of one program's tokens, as sums."""
    p = probs / tl.maximum(tl.sum(probs, 1), 1e-20)[:, None]
    share = gates / tl.maximum(tl.sum(gates, 1), 1e-20)[:, None]
    tl.store(sums_ptr, tl.sum(weight, 0))
    tl.store(sums_ptr + 1, tl.sum(one, 0))
    tl.store(sums_ptr + 2, tl.sum(-tl.sum(_xlogx(p), 1) / ENTROPY * weight, 0))
    tl.store(sums_ptr + 3, tl.sum(-tl.sum(_xlogx(share), 1) / ENTROPY * weight, 0))
    tl.store(sums_ptr + 4, tl.sum(tl.max(share, 1) * weight, 0))
    col = tl.reshape(cols, (cols.shape[1],))
    tl.store(sums_ptr + 5 + col, tl.sum(chosen * weight[:, None], 0), col < E)
    tl.store(sums_ptr + 5 + E + col, tl.sum(gates * weight[:, None], 0), col < E)


@triton.jit
def tile(T, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)[None, :]
    return row, cols, (row[:, None] < T) & (cols < E), row[:, None] * E + cols


@triton.jit
def top_k_fwd_kernel(
    logits_ptr,  # (T, E) fp32
    mask_ptr,  # (T,) bool: which tokens count
    gates_ptr,  # (T, E) fp32 out
    ids_ptr,  # (T, K) int64 out
    sums_ptr,  # (programs, S) fp32 out
    T,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    NORM: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_LOSSES: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Softmax, choice, gates and sums. Grid: (blocks of tokens,); a program owns all experts of its tokens."""
    row, cols, inside, at = tile(T, E, BLOCK_T, BLOCK_E)
    logits = tl.load(logits_ptr + at, inside, float("-inf"))
    logits = tl.where(row[:, None] < T, logits, tl.where(cols < E, 0.0, float("-inf")))
    largest = tl.max(logits, 1)
    powers = tl.exp(logits - largest[:, None])
    total = tl.sum(powers, 1)
    probs = powers / total[:, None]
    chosen = _choose(tl.where(cols < E, probs, -1.0), cols, ids_ptr + row * K, row < T, E, K)
    if NORM:
        # As p / sum p, but a single expert's gate is the constant 1 without rounding in its gradient.
        kept = tl.where(chosen > 0, tl.exp((logits - largest[:, None]) / temperature), 0.0)
        gates = kept / tl.sum(kept, 1)[:, None]
    else:
        gates = probs * chosen
    tl.store(gates_ptr + at, gates, inside)
    if STATS:
        one = tl.where(row < T, 1.0, 0.0)
        weight = one
        if MASKED:
            weight = tl.where(row < T, tl.load(mask_ptr + row, row < T, 0).to(tl.float32), 0.0)
        sums_ptr += tl.program_id(0) * S
        add_usage(sums_ptr, cols, inside, weight, one, probs, gates, chosen, E, ENTROPY)
        own = weight if MASK_LOSSES else one
        z = largest + tl.log(total)
        tl.store(sums_ptr + 5 + 2 * E, tl.sum(z * z * own, 0))
        tl.store(sums_ptr + 6 + 2 * E, 0.0)
        col = tl.reshape(cols, (BLOCK_E,))
        tl.store(sums_ptr + 7 + 2 * E + col, tl.sum(chosen * own[:, None], 0), col < E)
        tl.store(sums_ptr + 7 + 3 * E + col, tl.sum(probs * own[:, None], 0), col < E)


@triton.jit
def top_k_bwd_kernel(
    logits_ptr,  # (T, E) fp32
    mask_ptr,
    grad_gates_ptr,  # (T, E) fp32
    stats_ptr,  # (S,) fp32: the means of the forward, for their counts
    grad_stats_ptr,  # (S,) fp32
    grad_logits_ptr,  # (T, E) fp32 out
    ids_ptr,  # (T, K) int64
    T,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    STATS: tl.constexpr,
    MASK_LOSSES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of the logits from that of the gates and that of the losses' statistics. Grid as in the forward."""
    row, cols, inside, at = tile(T, E, BLOCK_T, BLOCK_E)
    logits = tl.load(logits_ptr + at, inside, float("-inf"))
    logits = tl.where(row[:, None] < T, logits, tl.where(cols < E, 0.0, float("-inf")))
    largest = tl.max(logits, 1)
    powers = tl.exp(logits - largest[:, None])
    total = tl.sum(powers, 1)
    probs = powers / total[:, None]
    chosen = tl.zeros_like(probs)
    for j in tl.static_range(K):
        one_id = tl.load(ids_ptr + row * K + j, row < T, -1)
        chosen = tl.where(cols == one_id[:, None], 1.0, chosen)
    grad_gates = tl.load(grad_gates_ptr + at, inside, 0.0)
    grad_probs = tl.zeros_like(probs)
    grad = tl.zeros_like(probs)
    if NORM:
        kept = tl.where(chosen > 0, tl.exp((logits - largest[:, None]) / temperature), 0.0)
        gates = kept / tl.maximum(tl.sum(kept, 1), 1e-30)[:, None]
        grad = gates * (grad_gates - tl.sum(gates * grad_gates, 1)[:, None]) / temperature
    else:
        grad_probs = grad_gates * chosen
    if STATS:
        count = tl.load(stats_ptr + (0 if MASK_LOSSES else 1))
        weight = 1.0 / tl.maximum(count, 1.0) + 0.0 * largest
        if MASK_LOSSES:
            weight = weight * tl.load(mask_ptr + row, row < T, 0).to(tl.float32)
        moved = tl.load(grad_stats_ptr + 7 + 3 * E + cols, cols < E, 0.0)
        grad_probs += moved * weight[:, None]
        z = largest + tl.log(total)
        grad += probs * (2.0 * z * weight * tl.load(grad_stats_ptr + 5 + 2 * E))[:, None]
    grad += probs * (grad_probs - tl.sum(probs * grad_probs, 1)[:, None])
    tl.store(grad_logits_ptr + at, grad, inside)


@triton.jit
def rank_wise_fwd_kernel(
    logits_ptr,  # (T, E) fp32
    bias_ptr,  # (E,) int32: steps of the bias
    mask_ptr,
    gates_ptr,
    ids_ptr,
    sums_ptr,
    T,
    rate,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BIAS_IN_GATES: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """``u = sigmoid(logits)``, the K largest of u + bias, gates ``K v / sum v``. Grid as for top-k."""
    row, cols, inside, at = tile(T, E, BLOCK_T, BLOCK_E)
    logits = tl.load(logits_ptr + at, inside, 0.0)
    scores = tl.where(cols < E, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    biased = scores + rate * tl.load(bias_ptr + cols, cols < E, 0).to(tl.float32)
    chosen = _choose(tl.where(cols < E, biased, float("-inf")), cols, ids_ptr + row * K, row < T, E, K)
    kept = (biased if BIAS_IN_GATES else scores) * chosen
    gates = K * kept / tl.sum(kept, 1)[:, None]
    tl.store(gates_ptr + at, gates, inside)
    if STATS:
        one = tl.where(row < T, 1.0, 0.0)
        weight = one
        if MASKED:
            weight = tl.where(row < T, tl.load(mask_ptr + row, row < T, 0).to(tl.float32), 0.0)
        add_usage(sums_ptr + tl.program_id(0) * S, cols, inside, weight, one, scores, gates, chosen, E, ENTROPY)


@triton.jit
def rank_wise_bwd_kernel(
    logits_ptr,
    bias_ptr,
    grad_gates_ptr,
    grad_logits_ptr,
    ids_ptr,
    T,
    rate,
    E: tl.constexpr,
    K: tl.constexpr,
    BIAS_IN_GATES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of the logits from that of the gates: only the chosen have one. Grid as in the forward."""
    row, cols, inside, at = tile(T, E, BLOCK_T, BLOCK_E)
    scores = 1.0 / (1.0 + tl.exp(-tl.load(logits_ptr + at, inside, 0.0)))
    value = scores
    if BIAS_IN_GATES:
        value = value + rate * tl.load(bias_ptr + cols, cols < E, 0).to(tl.float32)
    chosen = tl.zeros_like(scores)
    for j in tl.static_range(K):
        one_id = tl.load(ids_ptr + row * K + j, row < T, -1)
        chosen = tl.where(cols == one_id[:, None], 1.0, chosen)
    total = tl.sum(value * chosen, 1)
    total = tl.where(row < T, total, 1.0)[:, None]
    grad_gates = tl.load(grad_gates_ptr + at, inside, 0.0) * chosen
    grad = K / total * (grad_gates - tl.sum(grad_gates * value, 1)[:, None] / total) * chosen
    tl.store(grad_logits_ptr + at, grad * scores * (1.0 - scores), inside)


@triton.jit
def means_kernel(
    sums_ptr,  # (programs, S)
    stats_ptr,  # (S,) out
    programs,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Adds the sums of all programs, in order, and divides by the tokens that count, or by all in the columns FIRST to
    LAST - 1. Grid: (1,)."""
    cols = tl.arange(0, BLOCK_S)
    counts = tl.zeros((2,), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    for first in range(0, programs, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)[:, None]
        part = tl.load(sums_ptr + rows * S + cols[None, :], (rows < programs) & (cols < S)[None, :], 0.0)
        total += tl.sum(part, 0)
        both = tl.load(sums_ptr + rows * S + tl.arange(0, 2)[None, :], rows < programs, 0.0)
        counts += tl.sum(both, 0)
    tokens = tl.sum(tl.where(tl.arange(0, 2) == 0, counts, 0.0), 0)
    positions = tl.sum(tl.where(tl.arange(0, 2) == 1, counts, 0.0), 0)
    divisor = tl.maximum(tl.where((cols >= FIRST) & (cols < LAST), positions, tokens), 1.0)
    tl.store(stats_ptr + cols, tl.where(cols < 2, total, total / divisor), cols < S)
