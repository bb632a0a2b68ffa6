"""Top-k routing with a Switch-type balance loss, as Mixtral and MixLoRA have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from molora.checks import check_bool, check_fraction, check_int, check_number
from molora.routers.base import Router, RouterConfig, RouterLosses, Routing, masked_mean


@dataclass(frozen=True, kw_only=True)
class TopK(RouterConfig):
    """Each token goes to the `top_k` experts of highest probability.

    ``p = softmax(W x)``; the gates are the top-k entries of p, divided by their sum if `norm_topk_prob`.
    Losses: ``router_aux_loss_coef * E * sum_i F_i P_i`` with F_i the number of choices of expert i per token (they sum
    to top_k; no gradient) and P_i its mean probability, and ``router_z_loss_coef * mean(logsumexp(W x)^2)``.
    Source: MixLoRA, arXiv 2404.15159, section 3.2, and TUDB-Labs/MoE-PEFT (F over all top-k choices, statistics pooled
    over layers, padding excluded), which is also transformers' Mixtral loss; z-loss: ST-MoE, arXiv 2202.08906, eq. 5.

    Attributes:
        top_k: experts per token, 1 <= top_k <= num_experts. With `norm_topk_prob`, top_k=1 makes every gate the
            constant 1, and the language-model loss then gives the router no gradient.
        norm_topk_prob: gates of a token sum to one. Without it an FFN mixture scales the frozen FFN too, as published.
        router_jitter_noise: in training the router sees x * U(1 - noise, 1 + noise), 0 <= noise < 1 (Switch).
        router_aux_loss_coef: weight of the balance loss, >= 0.
        router_z_loss_coef: weight of the z-loss, >= 0.
        pool_layers: F and P are means over all layers, then multiplied (published); else the mean of each layer's loss.
        init_std: standard deviation of the router's initial weights (MixLoRA: 0.02).
    """

    name: ClassVar[str] = "top_k"

    top_k: int = 2
    norm_topk_prob: bool = True
    router_jitter_noise: float = 0.0
    router_aux_loss_coef: float = 1e-3
    router_z_loss_coef: float = 0.0
    pool_layers: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k)
        for key in ("norm_topk_prob", "pool_layers"):
            check_bool(key, getattr(self, key))
        check_fraction("router_jitter_noise", self.router_jitter_noise)
        for key in ("router_aux_loss_coef", "router_z_loss_coef"):
            check_number(key, getattr(self, key), at_least=0)
        check_number("init_std", self.init_std, above=0)  # at 0 all experts start with equal logits

    def check(self, num_experts: int) -> None:
        if self.top_k > num_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={num_experts}; lower router.top_k or raise num_experts"
            )

    def build(self, in_features: int, num_experts: int) -> TopKRouter:
        return TopKRouter(self, in_features, num_experts)

    def losses(self, stats: Sequence[Tensor]) -> RouterLosses:
        per_layer = torch.stack(list(stats))  # (L, 2E + 1)
        layers, num_experts = len(stats), (per_layer.shape[1] - 1) // 2
        load, prob, z = per_layer.split([num_experts, num_experts, 1], dim=1)
        if self.pool_layers:
            load = load.mean(0, keepdim=True).expand_as(load)
        balance = num_experts * (load * prob).sum() / layers  # linear in prob, so pooling it is the mean of products
        grad = torch.cat(
            [
                torch.zeros_like(load),
                load * (self.router_aux_loss_coef * num_experts / layers),
                torch.full_like(z, self.router_z_loss_coef / layers),
            ],
            dim=1,
        )
        value = self.router_aux_loss_coef * balance + self.router_z_loss_coef * z.mean()
        return RouterLosses(value, list(grad.unbind(0)))

    def describe(self, stats: Tensor) -> dict[str, Tensor]:
        num_experts = (stats.shape[0] - 1) // 2
        load, prob, z = stats.split([num_experts, num_experts, 1])
        return {"load": load / self.top_k, "mean_probability": prob, "z": z[0]}


class TopKRouter(Router):
    """The router of `TopK`. Weight: (E, D)."""

    config: TopK

    def __init__(self, config: TopK, in_features: int, num_experts: int) -> None:
        super().__init__(config, in_features, num_experts, config.init_std)

    def route(self, x: Tensor, token_mask: Tensor | None, with_stats: bool) -> Routing:
        config = self.config
        if self.training and config.router_jitter_noise:
            low = 1 - config.router_jitter_noise
            noise = torch.rand(x.shape, dtype=torch.float32, device=x.device)
            x = x * (low + 2 * config.router_jitter_noise * noise)
        logits = self.logits(x)
        probs = logits.softmax(-1)
        topk_weights, topk_ids = probs.topk(config.top_k, dim=-1)
        chosen = torch.zeros_like(probs).scatter(-1, topk_ids, 1.0)
        if config.norm_topk_prob:
            topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        gates = torch.zeros_like(probs).scatter(-1, topk_ids, topk_weights)
        stats = None
        if with_stats:
            z = logits.logsumexp(-1, keepdim=True).square()
            stats = masked_mean(torch.cat([chosen, probs, z], -1), token_mask)
        return Routing(gates, topk_ids, stats, config.norm_topk_prob or config.top_k == probs.shape[-1])
