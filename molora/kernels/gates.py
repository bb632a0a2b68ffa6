"""From router logits to gates, choices and statistics in one kernel each way (Triton).

What `routers/top_k.py` and `routers/rank_wise.py` compute by plain PyTorch, with their gradients; those are the
reference. Legend in `gates_kernels.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.launch import apply, blocks, power_of_2

MAX_GATES = 1024
"""A program holds all gates of its tokens in registers."""


class Gates(NamedTuple):
    """gates (T, E) fp32, the K chosen of each token (T, K) int64 in descending order, and statistics (S,) or None."""

    gates: Tensor
    topk_ids: Tensor
    stats: Tensor | None


class _Options(NamedTuple):
    top_k: int
    norm: bool = True
    temperature: float = 1.0
    with_stats: bool = False
    mask_losses: bool = True
    rate: float = 0.0
    bias_in_gates: bool = True


def tile_shape(logits: Tensor) -> dict[str, int]:
    """What every kernel is told of logits (T, E): E, and the tokens and the columns that one program holds."""
    E = logits.shape[1]
    return {"E": E, "BLOCK_T": max(1, min(64, 4096 // power_of_2(E))), "BLOCK_E": max(2, power_of_2(E))}


def new_ids(logits: Tensor, top_k: int) -> Tensor:
    return torch.empty(logits.shape[0], top_k, dtype=torch.int64, device=logits.device)


def new_sums(logits: Tensor, size: int, block_t: int) -> Tensor:
    """(programs, S) fp32 for the sums of every program's tokens; zeros where there are no tokens."""
    sums = torch.empty(max(1, blocks(logits.shape[0], block_t)), size, device=logits.device)
    return sums if logits.shape[0] else sums.zero_()


def means(sums: Tensor, unmasked: tuple[int, int] = (0, 0)) -> Tensor:
    """Statistics (S,) fp32 of the sums of all programs (programs, S).

    Args:
        unmasked: first and behind the last of the columns that are means over all tokens, padding too.
    """
    from molora.kernels import gates_kernels

    programs, size = sums.shape
    stats = torch.empty(size, dtype=torch.float32, device=sums.device)
    block_s = power_of_2(size)
    block_p = min(power_of_2(programs), max(1, 8192 // block_s))
    gates_kernels.means_kernel[(1,)](
        sums, stats, programs, S=size, FIRST=unmasked[0], LAST=unmasked[1], BLOCK_P=block_p, BLOCK_S=block_s
    )
    return stats


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor | None, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
        from molora.kernels import gates_kernels

        shape = tile_shape(logits)
        E, size = shape["E"], 7 + 4 * shape["E"]
        gates, ids = torch.empty_like(logits), new_ids(logits, options.top_k)
        sums = new_sums(logits, size, shape["BLOCK_T"])
        mask_losses = options.mask_losses and mask is not None
        if logits.shape[0]:
            gates_kernels.top_k_fwd_kernel[(sums.shape[0],)](
                logits,
                logits if mask is None else mask,
                gates,
                ids,
                sums,
                logits.shape[0],
                options.temperature,
                K=options.top_k,
                S=size,
                NORM=options.norm,
                STATS=options.with_stats,
                MASKED=mask is not None,
                MASK_LOSSES=mask_losses,
                ENTROPY=math.log(max(E, 2)),
                **shape,
            )
        stats = means(sums, (0, 0) if mask_losses else (5 + 2 * E, size)) if options.with_stats else sums
        ctx.options, ctx.mask_losses = options, mask_losses
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, mask, ids, stats)
        return gates, ids, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gates: Tensor | None, _: None, grad_stats: Tensor | None) -> tuple[Any, ...]:
        from molora.kernels import gates_kernels

        logits, mask, ids, stats = ctx.saved_tensors
        options: _Options = ctx.options
        shape = tile_shape(logits)
        grad = torch.empty_like(logits)
        has_stats = options.with_stats and grad_stats is not None
        if grad_gates is None:
            grad_gates = torch.zeros_like(logits)
        if logits.shape[0]:
            gates_kernels.top_k_bwd_kernel[(blocks(logits.shape[0], shape["BLOCK_T"]),)](
                logits,
                logits if mask is None else mask,
                grad_gates.contiguous(),
                stats,
                grad_stats.contiguous() if has_stats and grad_stats is not None else stats,
                grad,
                ids,
                logits.shape[0],
                options.temperature,
                K=options.top_k,
                NORM=options.norm,
                STATS=has_stats,
                MASK_LOSSES=ctx.mask_losses,
                **shape,
            )
        return grad, None, None


class _RankWise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias_steps: Tensor, mask: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        from molora.kernels import gates_kernels

        shape = tile_shape(logits)
        E, size = shape["E"], 5 + 2 * shape["E"]
        gates, ids = torch.empty_like(logits), new_ids(logits, options.top_k)
        sums = new_sums(logits, size, shape["BLOCK_T"])
        if logits.shape[0]:
            gates_kernels.rank_wise_fwd_kernel[(sums.shape[0],)](
                logits,
                bias_steps,
                logits if mask is None else mask,
                gates,
                ids,
                sums,
                logits.shape[0],
                options.rate,
                K=options.top_k,
                S=size,
                BIAS_IN_GATES=options.bias_in_gates,
                STATS=options.with_stats,
                MASKED=mask is not None,
                ENTROPY=math.log(max(E, 2)),
                **shape,
            )
        stats = means(sums) if options.with_stats else sums
        ctx.options = options
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        # A copy, for the bias may move between a forward and its backward.
        ctx.save_for_backward(logits, bias_steps.clone(), ids)
        return gates, ids, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gates: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        from molora.kernels import gates_kernels

        if grad_gates is None:
            return None, None, None, None
        logits, bias_steps, ids = ctx.saved_tensors
        options: _Options = ctx.options
        shape = tile_shape(logits)
        grad = torch.empty_like(logits)
        if logits.shape[0]:
            gates_kernels.rank_wise_bwd_kernel[(blocks(logits.shape[0], shape["BLOCK_T"]),)](
                logits,
                bias_steps,
                grad_gates.contiguous(),
                grad,
                ids,
                logits.shape[0],
                options.rate,
                K=options.top_k,
                BIAS_IN_GATES=options.bias_in_gates,
                **shape,
            )
        return grad, None, None, None


def top_k_gates(
    logits: Tensor,
    mask: Tensor | None,
    *,
    top_k: int,
    norm_topk_prob: bool = True,
    temperature: float = 1.0,
    with_stats: bool = False,
    mask_losses: bool = True,
) -> Gates:
    """Gates of the `top_k` largest logits of each token, as `routers.top_k.TopK` defines them.

    ``p = softmax(logits)``; gates ``softmax(chosen logits / temperature)`` with `norm_topk_prob`, else p of the chosen.
    The statistics are those of `routers.base.Router.statistics` with the router's own ``[mean lse^2, 0, F, P]``;
    gradients flow from the gates, from P and from the mean of lse^2.

    Args:
        logits: (T, E) fp32 on a device where `launch.ready`, E <= MAX_GATES.
        mask: (T,) bool, tokens that count; None: all.
        with_stats: whether to compute the statistics.
        mask_losses: whether tokens that do not count are left out of the router's own statistics too.

    Ties go to the lower expert.
    """
    options = _Options(top_k, norm_topk_prob, temperature, with_stats, mask_losses)
    gates, ids, stats = apply(_TopK, logits.contiguous(), None if mask is None else mask.contiguous(), options)
    return Gates(gates, ids, stats if with_stats else None)


def rank_wise_gates(
    logits: Tensor,
    bias_steps: Tensor,
    mask: Tensor | None,
    *,
    top_k: int,
    bias_update_rate: float,
    bias_in_gates: bool = True,
    with_stats: bool = False,
) -> Gates:
    """Gates of the `top_k` groups of ranks of highest score, as `routers.rank_wise.RankWise` defines them.

    ``u = sigmoid(logits)``, ``v = u + bias_update_rate * bias_steps``, gates ``K v_j / sum v`` over the chosen (or u in
    place of v without `bias_in_gates`).

    Args:
        logits: (T, G) fp32 on a device where `launch.ready`, G <= MAX_GATES.
        bias_steps: (G,) int32.
    """
    options = _Options(top_k, with_stats=with_stats, rate=bias_update_rate, bias_in_gates=bias_in_gates)
    mask = None if mask is None else mask.contiguous()
    gates, ids, stats = apply(_RankWise, logits.contiguous(), bias_steps, mask, options)
    return Gates(gates, ids, stats if with_stats else None)
