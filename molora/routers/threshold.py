"""Threshold routing: every expert whose probability reaches a threshold, learned or fixed (AdaMoLE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from molora.checks import check_bool, check_number
from molora.routers.balance import BalancedRouterConfig
from molora.routers.base import (
    Router,
    RouterLosses,
    Routing,
    SiteStats,
    Tokens,
    exact_linear,
    exact_sigmoid,
    new_weight,
)


@dataclass(frozen=True, kw_only=True)
class Threshold(BalancedRouterConfig):
    """Expert i is active for a token where ``p_i >= tau``; the gates of active experts are normalised to sum one.

    Adaptive: ``tau(x) = max_threshold * sigmoid(w . x + b)`` and an active expert weighs ``p_i - tau``, through which w
    and b learn. Fixed: ``tau = max_threshold`` and it weighs p_i; a token without an active expert gets gates zero.
    Balance loss: F_i the share of tokens with i active, P_i the mean of ``p_i - tau`` over all tokens (fixed: of p_i),
    for each router by itself, summed, padding included in the released code (`count_padding`).
    Source: AdaMoLE, arXiv 2405.00361, section 3; zefang-liu/AdaMoLE, src/adamole/layer.py, src/mole/layer.py.

    Attributes:
        adaptive: a threshold of its own for each token, learned.
        max_threshold: 0 < max_threshold < 1; None: 1 / num_experts, with which an adaptive router always has an active
            expert.
        init_std: as in `TopK`.
    """

    name: ClassVar[str] = "threshold"

    adaptive: bool = True
    max_threshold: float | None = None
    balance_pool: str = "router"
    balance_reduction: str = "sum"
    init_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("adaptive", self.adaptive)
        if self.max_threshold is not None:
            check_number("max_threshold", self.max_threshold, above=0)
            if self.max_threshold >= 1:
                raise ValueError(
                    f"max_threshold={self.max_threshold!r} must be above 0 and below 1: no probability would reach it"
                )
        if self.init_std is not None:
            check_number("init_std", self.init_std, above=0)

    def build(self, in_features: int, num_experts: int, r: int = 0) -> ThresholdRouter:
        return ThresholdRouter(self, in_features, num_experts)

    def losses(self, sites: Sequence[SiteStats]) -> RouterLosses:
        return self.balance(sites)


class ThresholdRouter(Router):
    """The router of `Threshold`. Weight: (E, D); adaptive: also threshold_weight (1, D) and threshold_bias (1,)."""

    config: Threshold

    def __init__(self, config: Threshold, in_features: int, num_experts: int) -> None:
        super().__init__(config, in_features, num_experts, config.init_std)
        if config.adaptive:
            self.threshold_weight = new_weight(1, in_features, config.init_std)
            self.threshold_bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        config = self.config
        probs = self.logits(x, tokens).softmax(-1)
        largest = 1 / self.num_gates if config.max_threshold is None else config.max_threshold
        if config.adaptive:
            threshold = largest * exact_sigmoid(exact_linear(x, self.threshold_weight, self.threshold_bias))
            margin = probs - threshold
            active = (margin.detach() >= 0).to(probs.dtype)
        else:
            margin, active = probs, (probs.detach() >= largest).to(probs.dtype)
        weights = margin * active
        total = weights.sum(1, keepdim=True)
        gates = weights / torch.where(total == 0, 1.0, total)
        stats = None
        if with_stats:
            stats = self.statistics(probs, gates, active, tokens.mask, config.own_statistics(active, margin, tokens))
        return Routing(gates, None, stats, config.adaptive and largest <= 1 / self.num_gates)
