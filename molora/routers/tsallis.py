"""Tsallis-entropy hybrid routing: dense where a token's distribution is flat, sparse where it is peaked (DynMoLE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from molora.checks import check_bool, check_choice, check_int, check_number
from molora.routers.balance import BalancedRouterConfig
from molora.routers.base import Router, RouterLosses, Routing, SiteStats, Tokens, masked_mean, widest
from molora.routers.top_p import check_top_p, top_p_mask


def tsallis_entropy(probs: Tensor, q: float, eps: float = 1e-5, normalize: bool = True) -> Tensor:
    """``S_q = (1 - sum_i (p_i + eps)^q) / (q - 1)``, Shannon's for q = 1: (T, E) to (T,).

    Normalised by its maximum ``(1 - E^(1-q)) / (q - 1)`` (q = 1: ln E). The smoothed p is not renormalised, as in the
    released code, so that a one-hot p is slightly below zero.
    """
    p, num_experts = probs + eps, probs.shape[-1]
    if q == 1:
        value, largest = -(p * p.log()).sum(-1), math.log(num_experts)
    else:
        value = (1 - p.pow(q).sum(-1)) / (q - 1)
        largest = (1 - num_experts ** (1 - q)) / (q - 1)
    return value / largest if normalize and num_experts > 1 else value


def renyi_entropy(probs: Tensor, q: float, eps: float = 1e-5, normalize: bool = True) -> Tensor:
    """``ln(sum_i (p_i + eps)^q + 1e-10) / (1 - q)``, Shannon's for q = 1, over ln E: (T, E) to (T,)."""
    if q == 1:
        return tsallis_entropy(probs, 1, eps, normalize)
    value = ((probs + eps).pow(q).sum(-1) + 1e-10).log() / (1 - q)
    return value / math.log(probs.shape[-1]) if normalize and probs.shape[-1] > 1 else value


_ENTROPIES = {"tsallis": tsallis_entropy, "renyi": renyi_entropy}


@dataclass(frozen=True, kw_only=True)
class Tsallis(BalancedRouterConfig):
    """All experts for a token of uncertain routing, the top-p experts for a certain one.

    ``p = softmax(W x)``, ``H = S_q(p) / max S_q``. If ``H > entropy_threshold`` the token uses every expert, else the
    experts while their running probability stays <= top_p, and the first `keep_top_k` always. Gates ``p * mask``, not
    renormalised. Losses: ``entropy_loss_coef * mean H + router_aux_loss_coef * E * sum_i F_i P_i`` with F_i the mean
    masked gate and P_i the mean probability, both with gradient, pooled over all routers of the model.
    Source: DynMoLE, arXiv 2504.00661; mikecovlee/DynMoLE, moe_peft/adapters/dynmole/model.py, moe_utils.py.

    Attributes:
        q: index of the entropy, 0 < q <= 2; 1 is Shannon's.
        entropy: "tsallis" or "renyi".
        entropy_eps: added to each probability inside the entropy, > 0.
        entropy_threshold: on H, >= 0; at 1 or above the test is left out and every token is sparse (ablation).
        top_p: 0 < top_p <= 1; None: only the first `keep_top_k` (ablation).
        keep_top_k: 1 <= keep_top_k <= num_experts.
        include_crossing: keep the expert that crosses top_p, as nucleus sampling does; the released code drops it.
        norm_topk_prob: gates of a token sum to one; the released code leaves them as they are.
        entropy_loss_coef: weight of the entropy loss, >= 0.
        entropy_over_padding: the entropy loss counts padding, as the released code does, while F and P do not.
        init_std: standard deviation of the router's initial weights; None: uniform in ±1/sqrt(D), which is the
            released kaiming_uniform with a = sqrt(5).
    """

    name: ClassVar[str] = "tsallis"
    soft_load: ClassVar[bool] = True

    q: float = 1.1
    entropy: str = "tsallis"
    entropy_eps: float = 1e-5
    entropy_threshold: float = 0.9
    top_p: float | None = 0.75
    keep_top_k: int = 2
    include_crossing: bool = False
    norm_topk_prob: bool = False
    entropy_loss_coef: float = 1e-2
    entropy_over_padding: bool = False
    init_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("q", self.q, above=0)
        if self.q > 2:
            raise ValueError(f"q={self.q!r} must be above 0 and at most 2; 1 is Shannon's entropy")
        check_choice("entropy", self.entropy, _ENTROPIES)
        check_number("entropy_eps", self.entropy_eps, above=0)
        check_number("entropy_threshold", self.entropy_threshold, at_least=0)
        if self.top_p is not None:
            check_top_p(self.top_p)
        check_int("keep_top_k", self.keep_top_k)
        for key in ("include_crossing", "norm_topk_prob", "entropy_over_padding"):
            check_bool(key, getattr(self, key))
        check_number("entropy_loss_coef", self.entropy_loss_coef, at_least=0)
        if self.init_std is not None:
            check_number("init_std", self.init_std, above=0)

    def check(self, num_experts: int, r: int, placement: str) -> None:
        if self.keep_top_k > num_experts:
            raise ValueError(
                f"keep_top_k={self.keep_top_k} exceeds num_experts={num_experts}; lower router.keep_top_k or raise "
                "num_experts"
            )

    def build(self, in_features: int, num_experts: int, r: int = 0) -> TsallisRouter:
        return TsallisRouter(self, in_features, num_experts, self.init_std)

    def losses(self, sites: Sequence[SiteStats]) -> RouterLosses:
        return self.balance(sites, 1, (self.entropy_loss_coef,))

    def describe_own(self, own: Tensor, num_gates: int) -> dict[str, Tensor]:
        return super().describe_own(own, num_gates) | {"normalized_entropy": own[0]}


class TsallisRouter(Router):
    """The router of `Tsallis`. Weight: (E, D)."""

    config: Tsallis

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        config = self.config
        probs = self.logits(x, tokens).softmax(-1)
        # In fp64, rounded once: the last bits of a power depend on the place in the batch, and a threshold sees them.
        exact = _ENTROPIES[config.entropy](probs.to(widest(probs)), config.q, config.entropy_eps)
        entropy = exact.to(probs.dtype)
        with torch.no_grad():
            kept = top_p_mask(probs, config.top_p or 0.0, config.keep_top_k, config.include_crossing)
            if config.entropy_threshold < 1:
                kept = torch.where((entropy > config.entropy_threshold).unsqueeze(1), 1.0, kept)
        soft = probs * kept
        gates = soft / soft.sum(-1, keepdim=True) if config.norm_topk_prob else soft
        stats = None
        if with_stats:
            own = config.own_statistics(soft, probs, tokens, entropy.unsqueeze(1))
            if config.entropy_over_padding:
                own = torch.cat([masked_mean(entropy.unsqueeze(1), None), own[1:]])
            stats = self.statistics(probs, gates, kept, tokens.mask, own)
        return Routing(gates, None, stats, config.norm_topk_prob)
