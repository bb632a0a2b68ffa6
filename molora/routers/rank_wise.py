"""Rank-wise routing: each rank of one LoRA is an expert, balanced by a bias that no gradient moves (SMoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from molora.checks import check_bool, check_choice, check_int, check_number
from molora.routers.base import Router, RouterConfig, Routing, Tokens, exact_sigmoid


@dataclass(frozen=True, kw_only=True)
class RankWise(RouterConfig):
    """The `active_ranks` of highest score, of the r ranks of a single LoRA.

    ``u = sigmoid(W x)``, ``v = u + bias``, T the top k of v, ``g_j = k v_j / sum_{l in T} v_l`` for j in T, and the
    LoRA's factor is lora_alpha / k. After each optimiser step
    ``bias_j += bias_update_rate * sign(mean(c) - c_j)`` with c_j the tokens that chose rank j in the step. The bias is
    an integer counter times the rate, so no cast of the model touches it.
    Source: SMoRA, arXiv 2501.15103; StyxXuan/smora, peft/tuners/srmole/layer.py.

    Attributes:
        active_ranks: k, 1 <= k <= r.
        rank_partition: consecutive ranks that share a score; it divides r and active_ranks.
        bias_update_rate: >= 0; 0 switches the balancing off.
        bias_in_gates: g is made of v, as released; without it of u, as in DeepSeek-V3 (arXiv 2408.15664).
        bias_update: "step": once for each optimiser step, from the counts of all its micro-batches on all ranks,
            without padding. "forward": in each training forward, from the counts of this process, padding included, as
            released; refuses activation checkpointing, whose second forward would move it again.
        init_std: standard deviation of the router's initial weights; None: nn.Linear's own, as released.
    """

    name: ClassVar[str] = "rank_wise"

    active_ranks: int = 8
    rank_partition: int = 1
    bias_update_rate: float = 1e-5
    bias_in_gates: bool = True
    bias_update: str = "step"
    init_std: float | None = None

    def __post_init__(self) -> None:
        check_int("active_ranks", self.active_ranks)
        check_int("rank_partition", self.rank_partition)
        check_number("bias_update_rate", self.bias_update_rate, at_least=0)
        check_bool("bias_in_gates", self.bias_in_gates)
        check_choice("bias_update", self.bias_update, ("step", "forward"))
        if self.init_std is not None:
            check_number("init_std", self.init_std, above=0)
        if self.active_ranks % self.rank_partition:
            raise ValueError(
                f"active_ranks={self.active_ranks} must be a multiple of rank_partition={self.rank_partition}, or the "
                "last block would be cut"
            )

    def check(self, num_experts: int, r: int, placement: str) -> None:
        if num_experts != 1:
            raise ValueError(
                f"router 'rank_wise' routes the ranks of one LoRA, got num_experts={num_experts}; set num_experts=1 "
                "and r to the total rank"
            )
        if placement == "ffn":
            raise ValueError("router 'rank_wise' mixes ranks, not whole FFNs; use placement='linear' or 'block'")
        if self.active_ranks > r:
            raise ValueError(f"active_ranks={self.active_ranks} exceeds r={r}; lower router.active_ranks or raise r")
        if r % self.rank_partition:
            raise ValueError(f"r={r} must be a multiple of rank_partition={self.rank_partition}")

    def num_gates(self, num_experts: int, r: int) -> int:
        return r // self.rank_partition

    def num_chosen(self, num_experts: int, r: int) -> int:
        return self.active_ranks // self.rank_partition

    def scaling_rank(self, r: int) -> int:
        return self.active_ranks

    @property
    def moves_in_forward(self) -> bool:
        return self.bias_update == "forward" and self.bias_update_rate > 0

    @property
    def moves_at_step(self) -> bool:
        return self.bias_update == "step" and self.bias_update_rate > 0

    def build(self, in_features: int, num_experts: int, r: int) -> RankWiseRouter:
        return RankWiseRouter(self, in_features, self.num_gates(num_experts, r), self.init_std)


class RankWiseRouter(Router):
    """The router of `RankWise`. Weight: (G, D) with G = r / rank_partition; bias_steps: (G,) int32."""

    config: RankWise
    bias_steps: Tensor

    def __init__(self, config: RankWise, in_features: int, num_gates: int, init_std: float | None) -> None:
        super().__init__(config, in_features, num_gates, init_std)
        self.register_buffer("bias_steps", torch.zeros(num_gates, dtype=torch.int32))

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        config = self.config
        groups = config.active_ranks // config.rank_partition
        scores = exact_sigmoid(self.logits(x, tokens))
        biased = scores + config.bias_update_rate * self.bias_steps.to(scores.dtype)
        topk_ids = biased.detach().topk(groups, dim=-1).indices
        chosen = torch.zeros_like(scores).scatter(-1, topk_ids, 1.0)
        kept = (biased if config.bias_in_gates else scores) * chosen
        gates = groups * kept / kept.sum(-1, keepdim=True)
        stats = None
        if with_stats:
            stats = self.statistics(scores, gates, chosen, tokens.mask, scores.new_zeros(0))
        if self.training and config.moves_in_forward:
            self.move(chosen.sum(0).to(torch.int64))
        return Routing(gates, topk_ids, stats, False)

    @torch.no_grad()
    def move(self, counts: Tensor) -> None:
        self.bias_steps += torch.sign(counts.sum() - counts.shape[0] * counts).to(torch.int32)
