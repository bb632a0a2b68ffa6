"""Top-p routing: as many experts as a probability mass needs (MixLoRA-dynamic)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from molora.checks import check_bool, check_number
from molora.routers.balance import BalancedRouterConfig
from molora.routers.base import Router, RouterLosses, Routing, SiteStats, Tokens


def check_top_p(value: object) -> None:
    """Raises ValueError unless 0 < top_p <= 1."""
    check_number("top_p", value, above=0)
    if value > 1:  # type: ignore[operator]
        raise ValueError(f"top_p={value!r} must be above 0 and at most 1")


def top_p_mask(probs: Tensor, top_p: float, keep_top_k: int, include_crossing: bool) -> Tensor:
    """One where an expert is kept: (T, E).

    Experts are taken by falling probability while their running sum stays <= top_p, and the first `keep_top_k` always.
    With `include_crossing` the one that crosses top_p is taken too, as in nucleus sampling. Of equals the lower
    expert comes first.
    """
    sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
    running = sorted_probs.cumsum(-1)
    # The mass before the crossing expert is <= top_p; in MoE-PEFT's words, what comes after it is cut.
    kept = (running - sorted_probs if include_crossing else running) <= top_p
    kept[..., :keep_top_k] = True
    return torch.zeros_like(probs).scatter(-1, order, kept.to(probs.dtype))


@dataclass(frozen=True, kw_only=True)
class TopP(BalancedRouterConfig):
    """The experts of highest probability whose sum reaches `top_p`; the gates are their probabilities.

    Balance loss: F_i is the share of tokens that keep expert i. Source: MixLoRA-dynamic, TUDB-Labs/MoE-PEFT,
    adapters/mixlora/model.py; after "Harder Tasks Need More Experts", arXiv 2403.07652.

    Attributes:
        top_p: 0 < top_p <= 1.
        include_crossing: the expert whose probability crosses top_p is kept (released). Without it a token may keep
            only its first expert, which is kept always.
        norm_topk_prob: gates of a token sum to one (released: they do not).
        temperature: divides the probabilities, after the softmax, as MoE-PEFT's option of this name does; None: off.
            Equal to a threshold top_p * temperature with gates divided by it.
        init_std: as in `TopK`.
    """

    name: ClassVar[str] = "top_p"

    top_p: float = 0.8
    include_crossing: bool = True
    norm_topk_prob: bool = False
    temperature: float | None = None
    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_top_p(self.top_p)
        check_bool("include_crossing", self.include_crossing)
        check_bool("norm_topk_prob", self.norm_topk_prob)
        for key in ("temperature", "init_std"):
            if getattr(self, key) is not None:
                check_number(key, getattr(self, key), above=0)

    def build(self, in_features: int, num_experts: int, r: int = 0) -> TopPRouter:
        return TopPRouter(self, in_features, num_experts, self.init_std)

    def losses(self, sites: Sequence[SiteStats]) -> RouterLosses:
        return self.balance(sites)


class TopPRouter(Router):
    """The router of `TopP`. Weight: (E, D)."""

    config: TopP

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        config = self.config
        probs = self.logits(x, tokens).softmax(-1)
        scaled = probs if config.temperature is None else probs / config.temperature
        kept = top_p_mask(scaled.detach(), config.top_p, 1, config.include_crossing)
        gates = scaled * kept
        if config.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
        stats = None
        if with_stats:
            stats = self.statistics(probs, gates, kept, tokens.mask, config.own_statistics(kept, probs, tokens))
        return Routing(gates, None, stats, config.norm_topk_prob)
