"""Triton: the gates of routing by an entropy, dense or top-p, and back. Host side in `tsallis_gates.py`.

Legend: T tokens, E experts, S statistics: those of `gates_kernels.py`, with the entropy H in column 5+2E, the gates
before their normalisation in 6+2E .. 6+3E and the probabilities in 6+3E .. 6+4E, all with the weights of the losses.
"""

# mypy: disallow-incomplete-defs=False
# Only the constexpr parameters of a kernel are annotated, which Triton needs; the others have no Python type.

import triton
import triton.language as tl

from molora.kernels.gates_kernels import add_usage, tile


@triton.jit
def _softmax(logits_ptr, row, cols, inside, at, T, E: tl.constexpr):
    logits = tl.load(logits_ptr + at, inside, float("-inf"))
    logits = tl.where(row[:, None] < T, logits, tl.where(cols < E, 0.0, float("-inf")))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    # Rounded to nearest, as the router's: equal logits meet a threshold alike.
    return tl.div_rn(powers, tl.sum(powers, 1)[:, None])


@triton.jit
def _log_smoothed(probs, EPS: tl.constexpr):
    """ln(p + eps) in fp64: 1 - sum p^q loses the digits of an fp32 for q near 1."""
    return tl.log(probs.to(tl.float64) + EPS)


@triton.jit
def _power_sum(log_p, cols, E: tl.constexpr, Q: tl.constexpr):
    return tl.sum(tl.where(cols < E, tl.exp(Q * log_p), 0.0), 1)


@triton.jit
def _entropy(
    probs, cols, E: tl.constexpr, Q: tl.constexpr, EPS: tl.constexpr, RENYI: tl.constexpr, SCALE: tl.constexpr
):
    """H of each row, fp32, rounded once."""
    log_p = _log_smoothed(probs, EPS)
    if Q == 1:
        value = -tl.sum(tl.where(cols < E, tl.exp(log_p) * log_p, 0.0), 1)
    elif RENYI:
        value = tl.log(_power_sum(log_p, cols, E, Q) + 1e-10)
    else:
        value = 1.0 - _power_sum(log_p, cols, E, Q)
    return (value * SCALE).to(tl.float32)


@triton.jit
def _entropy_grad(
    probs, cols, E: tl.constexpr, Q: tl.constexpr, EPS: tl.constexpr, RENYI: tl.constexpr, SCALE: tl.constexpr
):
    """d H / d logits: ``p_i (s_i - sum_j p_j s_j)`` with s = d H / d p, up to a constant, which cancels."""
    log_p = _log_smoothed(probs, EPS)
    if Q == 1:
        slope = -log_p
    else:
        slope = -Q * (tl.exp((Q - 1) * log_p) - 1.0)
        if RENYI:
            slope = -slope / (_power_sum(log_p, cols, E, Q) + 1e-10)[:, None]
    exact = probs.to(tl.float64)
    return (exact * (slope - tl.sum(exact * slope, 1)[:, None]) * SCALE).to(tl.float32)


@triton.jit
def _top_p(probs, cols, TOP_P: tl.constexpr, KEEP: tl.constexpr, CROSSING: tl.constexpr, E: tl.constexpr):
    """Whether an expert is among the first KEEP, or the mass up to it (CROSSING: before it) is at most TOP_P.

    Without a sort: every expert adds up those that come before it, of equal ones the lower, and itself. In fp64, where
    the order of the additions does not show.
    """
    mass = tl.zeros_like(probs).to(tl.float64)
    place = tl.zeros_like(probs).to(tl.int32)
    for j in range(E):
        other = tl.sum(tl.where(cols == j, probs, 0.0), 1)[:, None]
        comes_first = (other > probs) | ((other == probs) & (cols >= j))
        mass += tl.where(comes_first, other, 0.0).to(tl.float64)
        place += comes_first.to(tl.int32)
    running = mass.to(tl.float32)
    if CROSSING:
        running -= probs
    return (place <= KEEP) | (running <= TOP_P)


@triton.jit
def tsallis_fwd_kernel(
    logits_ptr,  # (T, E) fp32
    mask_ptr,  # (T,) bool: which tokens count
    gates_ptr,  # (T, E) fp32 out
    sums_ptr,  # (programs, S) fp32 out
    T,
    E: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    EPS: tl.constexpr,
    RENYI: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    TOP_P: tl.constexpr,
    KEEP: tl.constexpr,
    CROSSING: tl.constexpr,
    NORM: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_LOSSES: tl.constexpr,
    MASK_ENTROPY: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Softmax, entropy, choice, gates and sums. Grid: (blocks of tokens,); a program owns all experts of its tokens."""
    row, cols, inside, at = tile(T, E, BLOCK_T, BLOCK_E)
    probs = _softmax(logits_ptr, row, cols, inside, at, T, E)
    kept = _top_p(probs, cols, TOP_P, KEEP, CROSSING, E)
    if STATS or THRESHOLD < 1:
        entropy = _entropy(probs, cols, E, Q, EPS, RENYI, SCALE)
    if THRESHOLD < 1:
        kept = kept | (entropy > THRESHOLD)[:, None]
    chosen = tl.where(kept & (cols < E), 1.0, 0.0)
    soft = probs * chosen
    gates = soft
    if NORM:
        gates = tl.div_rn(soft, tl.sum(soft, 1)[:, None])
    tl.store(gates_ptr + at, gates, inside)
    if STATS:
        one = tl.where(row < T, 1.0, 0.0)
        weight = one
        if MASKED:
            weight = tl.where(row < T, tl.load(mask_ptr + row, row < T, 0).to(tl.float32), 0.0)
        sums_ptr += tl.program_id(0) * S
        add_usage(sums_ptr, cols, inside, weight, one, probs, gates, chosen, E, ENTROPY)
        own = weight if MASK_LOSSES else one
        sums_ptr += 5 + 2 * E
        tl.store(sums_ptr, tl.sum(entropy * (weight if MASK_ENTROPY else one), 0))
        col = tl.reshape(cols, (BLOCK_E,))
        tl.store(sums_ptr + 1 + col, tl.sum(soft * own[:, None], 0), col < E)
        tl.store(sums_ptr + 1 + E + col, tl.sum(probs * own[:, None], 0), col < E)


@triton.jit
def _loss_weight(stats_ptr, mask_ptr, row, T, MASK: tl.constexpr):
    """What each token weighs in a mean."""
    one = tl.where(row < T, 1.0, 0.0)
    if MASK:
        one = tl.load(mask_ptr + row, row < T, 0).to(tl.float32)
    return one / tl.maximum(tl.load(stats_ptr + (0 if MASK else 1)), 1.0)


@triton.jit
def tsallis_bwd_kernel(
    logits_ptr,  # (T, E) fp32
    mask_ptr,
    gates_ptr,  # (T, E) fp32: those of the forward
    grad_gates_ptr,  # (T, E) fp32
    stats_ptr,  # (S,) fp32: the means of the forward, for their counts
    grad_stats_ptr,  # (S,) fp32
    grad_logits_ptr,  # (T, E) fp32 out
    T,
    E: tl.constexpr,
    Q: tl.constexpr,
    EPS: tl.constexpr,
    RENYI: tl.constexpr,
    SCALE: tl.constexpr,
    NORM: tl.constexpr,
    STATS: tl.constexpr,
    MASK_LOSSES: tl.constexpr,
    MASK_ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of the logits from that of the gates and that of the losses' statistics. Grid as in the forward."""
    row, cols, inside, at = tile(T, E, BLOCK_T, BLOCK_E)
    probs = _softmax(logits_ptr, row, cols, inside, at, T, E)
    gates = tl.load(gates_ptr + at, inside, 0.0)
    # A chosen expert of probability zero has a gate of zero, and no gradient either.
    chosen = tl.where(gates > 0, 1.0, 0.0)
    grad_soft = tl.load(grad_gates_ptr + at, inside, 0.0)
    if NORM:
        total = tl.sum(probs * chosen, 1)
        total = tl.where(row < T, total, 1.0)[:, None]
        grad_soft = (grad_soft - tl.sum(gates * grad_soft, 1)[:, None]) / total
    grad_probs = grad_soft * chosen
    grad = tl.zeros_like(probs)
    if STATS:
        weight = _loss_weight(stats_ptr, mask_ptr, row, T, MASK_LOSSES)[:, None]
        own_ptr = grad_stats_ptr + 5 + 2 * E
        grad_probs += chosen * weight * tl.load(own_ptr + 1 + cols, cols < E, 0.0)
        grad_probs += weight * tl.load(own_ptr + 1 + E + cols, cols < E, 0.0)
        pull = _loss_weight(stats_ptr, mask_ptr, row, T, MASK_ENTROPY) * tl.load(own_ptr)
        grad = _entropy_grad(probs, cols, E, Q, EPS, RENYI, SCALE) * pull[:, None]
    grad += probs * (grad_probs - tl.sum(probs * grad_probs, 1)[:, None])
    tl.store(grad_logits_ptr + at, grad, inside)
