"""Dense routing: every token uses every expert (HydraLoRA, LoRAMoE, MoLORA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from molora.checks import check_bool, check_fraction, check_number
from molora.routers.balance import BalancedRouterConfig
from molora.routers.base import Router, RouterLosses, Routing, SiteStats, Tokens


@dataclass(frozen=True, kw_only=True)
class Softmax(BalancedRouterConfig):
    """The gates are ``p = softmax((W x + b) / temperature)``.

    Losses: the balance loss with F the arg-max choices (off by default); MoLE's
    ``log_balance_coef * -sum_i ln P_i`` with P_i the mean gate over tokens and routers; and LoRAMoE's localised balance
    ``localized_balance_coef * var(Q') / (mean(Q')^2 + 1e-10)`` over rows b and experts i, with ``Q_bi`` the sum of p_i
    over the tokens of row b, times 1 + delta for the half of the experts that belongs to the row's task type (1: the
    first half, 0: the second) and 1 - delta for the other; unbiased variance, summed over routers.
    Source: HydraLoRA, arXiv 2404.19245, Clin0212/HydraLoRA; LoRAMoE, arXiv 2312.09979, Ablustrund/LoRAMoE; MoLE, arXiv
    2404.13628, section 3.3.

    Attributes:
        temperature: > 0.
        learned_temperature: the temperature is a parameter that starts at `temperature`, one for each router (MoLE).
        log_balance_coef: >= 0.
        bias: the router's linear has a bias.
        localized_balance_coef: >= 0; above 0, training needs `task_labels` (0 or 1; negative: of neither type) in
            every batch.
        localized_balance_delta: 0 <= delta < 1.
        init_std: as in `TopK`.
    """

    name: ClassVar[str] = "softmax"

    router_aux_loss_coef: float = 0.0
    temperature: float = 1.0
    learned_temperature: bool = False
    log_balance_coef: float = 0.0
    bias: bool = False
    localized_balance_coef: float = 0.0
    localized_balance_delta: float = 0.0
    init_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, above=0)
        check_bool("bias", self.bias)
        check_bool("learned_temperature", self.learned_temperature)
        check_number("log_balance_coef", self.log_balance_coef, at_least=0)
        check_number("localized_balance_coef", self.localized_balance_coef, at_least=0)
        check_fraction("localized_balance_delta", self.localized_balance_delta)
        if self.init_std is not None:
            check_number("init_std", self.init_std, above=0)

    def check(self, num_experts: int, r: int, placement: str) -> None:
        if self.localized_balance_coef and num_experts % 2:
            raise ValueError(
                f"localized_balance_coef needs an even num_experts, a half for each task type, got {num_experts}"
            )

    def task_labels(self, num_experts: int) -> int:
        return 2 if self.localized_balance_coef else 0

    def num_chosen(self, num_experts: int, r: int) -> int:
        return num_experts

    def build(self, in_features: int, num_experts: int, r: int = 0) -> SoftmaxRouter:
        return SoftmaxRouter(self, in_features, num_experts)

    def losses(self, sites: Sequence[SiteStats]) -> RouterLosses:
        # The localised balance is a sum over routers.
        value, grads = self.balance(sites, 1, (self.localized_balance_coef * len(sites),))
        if self.log_balance_coef:
            probs = [self.split_own(site.own, site.num_gates, 1)[2].mean(0) for site in sites]
            mean = torch.stack(probs).mean(0)
            mean = torch.where(mean > 0, mean, 1.0)  # no token counted, as in a micro-batch of padding
            value = value - self.log_balance_coef * mean.log().sum()
            for site, grad in zip(sites, grads, strict=True):
                _, _, grad_probs = self.split_own(grad, site.num_gates, 1)
                grad_probs -= self.log_balance_coef / (mean * len(sites) * grad_probs.shape[0])
        return RouterLosses(value, grads)

    def describe_own(self, own: Tensor, num_gates: int) -> dict[str, Tensor]:
        named = super().describe_own(own, num_gates)
        return named | ({"localized_balance": own[0]} if self.localized_balance_coef else {})


class SoftmaxRouter(Router):
    """The router of `Softmax`. Weight: (E, D); log_temperature: (1,) where it is learned."""

    config: Softmax

    def __init__(self, config: Softmax, in_features: int, num_experts: int) -> None:
        super().__init__(config, in_features, num_experts, config.init_std, config.bias)
        if config.learned_temperature:
            # As a logarithm, so that it stays positive.
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)], dtype=torch.float32))

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        config = self.config
        temperature: Any = config.temperature
        if config.learned_temperature:
            temperature = self.log_temperature.exp().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        probs = (self.logits(x, tokens) / temperature).softmax(-1)
        stats = None
        if with_stats:
            chosen = torch.ones_like(probs)
            top = torch.zeros_like(probs).scatter(1, probs.argmax(1, keepdim=True), 1.0)
            own = config.own_statistics(top, probs, tokens, torch.zeros_like(probs[:, :1]))
            if config.localized_balance_coef:
                own = torch.cat([self._localized_balance(probs, tokens).view(1), own[1:]])
            stats = self.statistics(probs, probs, chosen, tokens.mask, own)
        return Routing(probs, None, stats, True)

    def _localized_balance(self, probs: Tensor, tokens: Tokens) -> Tensor:
        config = self.config
        assert tokens.task_labels is not None
        counted = probs
        if tokens.mask is not None and not config.count_padding:
            counted = probs * tokens.mask.unsqueeze(1).to(probs.dtype)
        total = tokens.sum_by_sequence(counted)
        task_type = tokens.task_labels.new_full((total.shape[0],), -1)
        sequences = tokens.sequences(probs)
        task_type = task_type.scatter_reduce(0, sequences, tokens.task_labels, "amax").unsqueeze(1)
        first_half = torch.arange(self.num_gates, device=probs.device) < self.num_gates // 2
        sign = 2 * (first_half == (task_type == 1)).to(total.dtype) - 1
        total = total * (1 + config.localized_balance_delta * sign * (task_type >= 0))
        return total.var() / (total.mean().square() + 1e-10)
