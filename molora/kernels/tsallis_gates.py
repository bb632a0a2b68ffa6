"""From router logits to the gates and statistics of routing by an entropy, in one kernel each way (Triton).

What `routers/tsallis.py` computes by plain PyTorch, with its gradients; that is the reference. Legend in
`tsallis_gates_kernels.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.gates import means, new_sums, tile_shape
from molora.kernels.launch import apply, blocks


class _Options(NamedTuple):
    q: float
    eps: float
    renyi: bool
    threshold: float
    top_p: float
    keep_top_k: int
    include_crossing: bool
    norm_topk_prob: bool
    with_stats: bool
    mask_losses: bool
    mask_entropy: bool


@functools.cache
def _entropy(options: _Options, num_experts: int) -> dict[str, Any]:
    """What the kernels are told of H: its index, and the factor that ends its computation, over its maximum."""
    q, factor, largest = options.q, 1.0, math.log(num_experts)
    if q != 1 and options.renyi:
        factor = 1 / (1 - q)
    elif q != 1:
        factor = 1 / (q - 1)
        largest = (1 - num_experts ** (1 - q)) / (q - 1)
    if num_experts > 1:
        factor /= largest
    return {"Q": float(q), "EPS": float(options.eps), "RENYI": options.renyi, "SCALE": factor}


class _Tsallis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor | None, options: _Options) -> tuple[Tensor, Tensor]:
        from molora.kernels import tsallis_gates_kernels

        shape = tile_shape(logits)
        E, size = shape["E"], 6 + 4 * shape["E"]
        gates, sums = torch.empty_like(logits), new_sums(logits, size, shape["BLOCK_T"])
        if logits.shape[0]:
            tsallis_gates_kernels.tsallis_fwd_kernel[(sums.shape[0],)](
                logits,
                logits if mask is None else mask,
                gates,
                sums,
                logits.shape[0],
                S=size,
                THRESHOLD=options.threshold,
                TOP_P=options.top_p,
                KEEP=options.keep_top_k,
                CROSSING=options.include_crossing,
                NORM=options.norm_topk_prob,
                STATS=options.with_stats,
                MASKED=mask is not None,
                MASK_LOSSES=options.mask_losses,
                MASK_ENTROPY=options.mask_entropy,
                ENTROPY=math.log(max(E, 2)),
                **_entropy(options, E),
                **shape,
            )
        own = 5 + 2 * E
        last = size if not options.mask_losses else own + (not options.mask_entropy)
        stats = means(sums, (own, last)) if options.with_stats else sums
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, mask, gates)
        # A few numbers, which are not worth the hooks that activation checkpointing runs for a saved tensor.
        ctx.stats = stats.detach() if options.with_stats else logits.new_empty(0)
        return gates, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gates: Tensor | None, grad_stats: Tensor | None) -> tuple[Any, ...]:
        from molora.kernels import tsallis_gates_kernels

        logits, mask, gates = ctx.saved_tensors
        options: _Options = ctx.options
        stats: Tensor = ctx.stats
        shape = tile_shape(logits)
        grad = torch.empty_like(logits)
        has_stats = options.with_stats and grad_stats is not None
        if grad_gates is None:
            grad_gates = torch.zeros_like(logits)
        if logits.shape[0]:
            tsallis_gates_kernels.tsallis_bwd_kernel[(blocks(logits.shape[0], shape["BLOCK_T"]),)](
                logits,
                logits if mask is None else mask,
                gates,
                grad_gates.contiguous(),
                stats,
                grad_stats.contiguous() if has_stats and grad_stats is not None else stats,
                grad,
                logits.shape[0],
                NORM=options.norm_topk_prob,
                STATS=has_stats,
                MASK_LOSSES=options.mask_losses,
                MASK_ENTROPY=options.mask_entropy,
                **_entropy(options, shape["E"]),
                **shape,
            )
        return grad, None, None


def tsallis_gates(
    logits: Tensor,
    mask: Tensor | None,
    *,
    q: float,
    eps: float,
    renyi: bool,
    threshold: float,
    top_p: float,
    keep_top_k: int,
    include_crossing: bool = False,
    norm_topk_prob: bool = False,
    with_stats: bool = False,
    mask_losses: bool = True,
    mask_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gates (T, E) fp32 and statistics (S,) fp32 or None, as `routers.tsallis.Tsallis` defines them.

    ``p = softmax(logits)``, gates p of all experts where ``H(p) > threshold``, else of those whose running probability
    stays <= top_p and of the first `keep_top_k`. The statistics are those of `routers.base.Router.statistics` with the
    router's own ``[mean H, F, P]``; gradients flow from the gates and from these.

    Args:
        logits: (T, E) fp32 on a device where `launch.ready`, E <= `gates.MAX_GATES`.
        mask: (T,) bool, tokens that count; None: all.
        renyi: H is Rényi's entropy, else Tsallis'; of index q, with `eps` added to each probability, over its maximum.
        threshold: at 1 or above no token uses all experts.
        with_stats: whether to compute the statistics.
        mask_losses: whether tokens that do not count are left out of F and P too.
        mask_entropy: whether they are left out of the mean of H.

    Ties go to the lower expert.
    """
    options = _Options(
        q,
        eps,
        renyi,
        threshold,
        top_p,
        keep_top_k,
        include_crossing,
        norm_topk_prob,
        with_stats,
        mask_losses and mask is not None,
        mask_entropy and mask is not None,
    )
    gates, stats = apply(_Tsallis, logits.contiguous(), None if mask is None else mask.contiguous(), options)
    return gates, stats if with_stats else None
