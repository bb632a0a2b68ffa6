"""Routers that have a kernel: gates, choices and statistics from logits in one launch each way."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.kernels import gates, launch, selection, tsallis_gates
from molora.kernels.shrink import shrink
from molora.routers import RankWise, Router, Routing, Tokens, TopK, Tsallis
from molora.routers.rank_wise import RankWiseRouter


def fast_route(router: Router, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
    """`Router.route` faster, where x (T, D) is 16 bits wide on a GPU with Triton: logits by `shrink`, unless they were
    made together with others', then the router's kernel if it has one."""
    if tokens.logits is None and not router.reads_by_itself and selection.reads_first(x):
        tokens = tokens._replace(logits=shrink(x, [], [router.product_weight]).logits[0])
    return kernel_routing(router, tokens, with_stats) or router.route(x, tokens, with_stats)


def kernel_routing(router: Router, tokens: Tokens, with_stats: bool) -> Routing | None:
    """What ``router(x, tokens, with_stats)`` decides, by kernel; None where the router has none for its settings, or
    there are no logits to start from. `Router.route` is the reference."""
    logits, config = tokens.logits, router.config
    if logits is None or not launch.ready(logits.device) or logits.shape[1] > gates.MAX_GATES:
        return None
    if isinstance(config, TopK):
        if config.task_loss_coef or config.balance_over == "sample" or (router.training and config.has_capacity):
            return None
        found = gates.top_k_gates(
            logits if router.bias is None else logits + router.bias,
            tokens.mask,
            top_k=config.top_k,
            norm_topk_prob=config.norm_topk_prob,
            temperature=1.0 if router.training else config.router_temperature,
            with_stats=with_stats,
            mask_losses=not config.count_padding,
        )
        return Routing(*found, config.norm_topk_prob or config.top_k == logits.shape[1])
    if isinstance(config, RankWise):
        if router.training and config.moves_in_forward:
            return None
        assert isinstance(router, RankWiseRouter)
        found = gates.rank_wise_gates(
            logits,
            router.bias_steps,
            tokens.mask,
            top_k=config.active_ranks // config.rank_partition,
            bias_update_rate=config.bias_update_rate,
            bias_in_gates=config.bias_in_gates,
            with_stats=with_stats,
        )
        return Routing(*found, False)
    if isinstance(config, Tsallis):
        if config.balance_over == "sample" or logits.dtype != torch.float32:
            return None
        weights, stats = tsallis_gates.tsallis_gates(
            logits,
            tokens.mask,
            q=config.q,
            eps=config.entropy_eps,
            renyi=config.entropy == "renyi",
            threshold=config.entropy_threshold,
            top_p=config.top_p or 0.0,
            keep_top_k=config.keep_top_k,
            include_crossing=config.include_crossing,
            norm_topk_prob=config.norm_topk_prob,
            with_stats=with_stats,
            mask_losses=not config.count_padding,
            mask_entropy=not (config.count_padding or config.entropy_over_padding),
        )
        return Routing(weights, None, stats, config.norm_topk_prob)
    return None
