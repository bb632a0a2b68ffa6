"""PHATGOOSE routing: each expert's gate is trained alone, on its own task; a token goes to the gates it fits best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from molora.checks import check_int
from molora.routers.base import Router, RouterConfig, Routing, Tokens

_LAYER_NORM_EPS = 1e-5
_TOP_K_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Phatgoose(RouterConfig):
    """One gate vector v_i for each expert, trained with everything else frozen, then standardised to route.

    In training a token of task i passes through expert i alone, with gate ``sigmoid(v_i . x)``; so each vector learns
    from its own task, as if it were trained by itself, and every batch needs `task_labels`. Outside training both x and
    v_i are standardised (LayerNorm without scale and shift, eps 1e-5), ``p = softmax(x^ . v^_i / sqrt(D))``, and the
    gates are the `top_k` largest p over their sum (plus 1e-6, as released). Experts that a module lacks are not chosen,
    nor are those whose gate was not trained.
    Source: Muqeeth et al., arXiv 2402.05859, section 3; r-three/phatgoose, src/models/addons/moe.py (vectors start at
    zero; 100 steps each).

    Attributes:
        top_k: experts per token; a pool of fewer experts uses all (released: 2).
    """

    name: ClassVar[str] = "phatgoose"

    top_k: int = 2

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k)

    def num_chosen(self, num_experts: int, r: int) -> int:
        return min(self.top_k, num_experts)

    def task_labels(self, num_experts: int) -> int:
        return num_experts

    def build(self, in_features: int, num_experts: int, r: int = 0) -> PhatgooseRouter:
        return PhatgooseRouter(self, in_features, num_experts)


class PhatgooseRouter(Router):
    """The router of `Phatgoose`. weight: (E, D), the gate vectors; present: (E,) bool."""

    config: Phatgoose
    present: Tensor

    def __init__(self, config: Phatgoose, in_features: int, num_experts: int) -> None:
        super().__init__(config, in_features, num_experts)
        nn.init.zeros_(self.weight)
        self.register_buffer("present", torch.ones(num_experts, dtype=torch.bool))

    @property
    def product_weight(self) -> Tensor:
        if self.training:
            return self.weight
        # A standardised vector sums to zero, so that its product with x needs no mean taken off x.
        return functional.layer_norm(self.weight, self.weight.shape[1:], eps=_LAYER_NORM_EPS)

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        logits = self.logits(x, tokens)
        if self.training:
            labels = tokens.task_labels
            assert labels is not None
            chosen = (labels[:, None] == torch.arange(self.num_gates, device=x.device)).to(logits.dtype)
            probs = logits.sigmoid()
            gates, topk_ids = probs * chosen, None
        else:
            deviation = x.to(logits.dtype).var(1, correction=0, keepdim=True).add(_LAYER_NORM_EPS).sqrt()
            scores = logits / (deviation * math.sqrt(x.shape[1]))
            trained = self.present & self.weight.any(
                1
            )  # a gate at zero has learned nothing, and no expert is that good
            choosable = torch.where(trained.any(), trained, self.present)
            probs = scores.masked_fill(~choosable, float("-inf")).softmax(1)
            top, topk_ids = probs.topk(self.config.num_chosen(self.num_gates, 0), dim=1)
            gates = torch.zeros_like(probs).scatter(1, topk_ids, top / (top.sum(1, keepdim=True) + _TOP_K_EPS))
            chosen = torch.zeros_like(gates).scatter(1, topk_ids, 1.0) * choosable
        stats = None
        if with_stats:
            stats = self.statistics(probs, gates, chosen, tokens.mask, gates.new_zeros(0))
        return Routing(gates, topk_ids, stats, False)
