"""Top-k routing: MixLoRA, Switch with capacity, MoLA, LLaVA-MoLE, MeteoRA are all points on its switches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from molora.checks import check_bool, check_choice, check_fraction, check_int, check_number
from molora.routers.balance import BalancedRouterConfig
from molora.routers.base import Router, RouterLosses, Routing, SiteStats, Tokens, widest


@dataclass(frozen=True, kw_only=True)
class TopK(BalancedRouterConfig):
    """Each token goes to the `top_k` experts of highest probability.

    ``p = softmax(W x)``; the gates are the top-k entries of p, divided by their sum if `norm_topk_prob`.
    Losses: ``router_aux_loss_coef * E * sum_i F_i P_i`` with F_i the number of choices of expert i per token (they sum
    to top_k; no gradient) and P_i its mean probability; ``router_z_loss_coef * mean(logsumexp(W x)^2)``; and
    ``task_loss_coef * mean(-ln p[task])`` over the tokens that have a task label.
    Source: MixLoRA, arXiv 2404.15159, section 3.2, and TUDB-Labs/MoE-PEFT (F over all top-k choices, statistics pooled
    over layers, padding excluded), which is also transformers' Mixtral loss; z-loss: ST-MoE, arXiv 2202.08906, eq. 5;
    capacity: Switch, arXiv 2101.03961, section 2.2; task loss: MeteoRA, arXiv 2405.13053, NJUDeepEngine/meteora.

    Attributes:
        top_k: experts per token, 1 <= top_k <= num_experts. With `norm_topk_prob`, top_k=1 makes every gate the
            constant 1, and the language-model loss then gives the router no gradient.
        norm_topk_prob: gates of a token sum to one. Without it an FFN mixture scales the frozen FFN too, as published.
        router_jitter_noise: in training the router sees x * U(1 - noise, 1 + noise), 0 <= noise < 1 (Switch).
        router_temperature: outside training the gates are softmax(top-k logits / temperature), > 0 (MeteoRA: 1 for
            single tasks, 15 to 30 for composite ones). Needs `norm_topk_prob`.
        expert_capacity: in training an expert takes at most so many tokens of a sequence, in their order; what comes
            later gets gate zero. Outside training it takes all, so that decoding with a cache equals the whole forward.
        capacity_factor: expert_capacity = ceil(factor * top_k * length / E), > 0. At most one of the two.
        dropped_tokens: what an FFN mixture returns for a token beyond capacity: "zero" (Switch: the residual stream
            passes by) or "input": p_max * x, as MoE-PEFT's mixlora-switch does.
        router_z_loss_coef: weight of the z-loss, >= 0.
        task_loss_coef: weight of the supervised gate loss, >= 0; above 0, training needs `task_labels` in every batch.
        shift_task_labels: the gate of a token learns the task of the next one (released MeteoRA); it matters only where
            tasks meet within a row.
        bias: the router's linear has a bias.
        init_std: standard deviation of the router's initial weights (MixLoRA: 0.02); None: nn.Linear's own.
    """

    name: ClassVar[str] = "top_k"

    top_k: int = 2
    norm_topk_prob: bool = True
    router_jitter_noise: float = 0.0
    router_temperature: float = 1.0
    expert_capacity: int | None = None
    capacity_factor: float | None = None
    dropped_tokens: str = "zero"
    router_z_loss_coef: float = 0.0
    task_loss_coef: float = 0.0
    shift_task_labels: bool = True
    bias: bool = False
    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("top_k", self.top_k)
        for key in ("norm_topk_prob", "shift_task_labels", "bias"):
            check_bool(key, getattr(self, key))
        check_fraction("router_jitter_noise", self.router_jitter_noise)
        check_number("router_temperature", self.router_temperature, above=0)
        for key in ("router_z_loss_coef", "task_loss_coef"):
            check_number(key, getattr(self, key), at_least=0)
        if self.expert_capacity is not None:
            check_int("expert_capacity", self.expert_capacity)
        if self.capacity_factor is not None:
            check_number("capacity_factor", self.capacity_factor, above=0)
        check_choice("dropped_tokens", self.dropped_tokens, ("zero", "input"))
        if self.init_std is not None:
            check_number("init_std", self.init_std, above=0)  # at 0 all experts start with equal logits
        if self.expert_capacity is not None and self.capacity_factor is not None:
            raise ValueError("expert_capacity and capacity_factor both set the capacity; give one of them")
        if self.router_temperature != 1 and not self.norm_topk_prob:
            raise ValueError("router_temperature needs norm_topk_prob=True: it weighs the chosen experts anew")

    def check(self, num_experts: int, r: int, placement: str) -> None:
        if self.top_k > num_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={num_experts}; lower router.top_k or raise num_experts"
            )
        if self.dropped_tokens == "input" and placement != "ffn":
            raise ValueError(
                f"dropped_tokens='input' is a rule for whole FFNs, not for placement={placement!r}; use 'zero', which "
                "leaves the frozen linear as it is"
            )

    def task_labels(self, num_experts: int) -> int:
        return num_experts if self.task_loss_coef else 0

    @property
    def has_capacity(self) -> bool:
        return self.expert_capacity is not None or self.capacity_factor is not None

    def num_chosen(self, num_experts: int, r: int) -> int:
        return self.top_k

    def build(self, in_features: int, num_experts: int, r: int = 0) -> TopKRouter:
        return TopKRouter(self, in_features, num_experts, self.init_std, self.bias)

    def losses(self, sites: Sequence[SiteStats]) -> RouterLosses:
        return self.balance(sites, 2, (self.router_z_loss_coef, self.task_loss_coef))

    def describe_own(self, own: Tensor, num_gates: int) -> dict[str, Tensor]:
        named = super().describe_own(own, num_gates) | {"z": own[0]}
        return named | ({"task_loss": own[1]} if self.task_loss_coef else {})


class TopKRouter(Router):
    """The router of `TopK`. Weight: (E, D)."""

    config: TopK

    @property
    def reads_by_itself(self) -> bool:
        return self.training and self.config.router_jitter_noise > 0

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        config = self.config
        if self.reads_by_itself:
            low = 1 - config.router_jitter_noise
            noise = torch.rand(x.shape, dtype=torch.float32, device=x.device)
            x = x * (low + 2 * config.router_jitter_noise * noise)
        logits = self.logits(x, tokens)
        probs = logits.softmax(-1)
        topk_weights, topk_ids = probs.topk(config.top_k, dim=-1)
        chosen = torch.zeros_like(probs).scatter(-1, topk_ids, 1.0)
        if config.norm_topk_prob:
            # As p / sum p, but a single expert's gate is the constant 1 without rounding in its gradient.
            temperature = 1.0 if self.training else config.router_temperature
            topk_weights = (logits.gather(-1, topk_ids) / temperature).softmax(-1)
        gates = torch.zeros_like(probs).scatter(-1, topk_ids, topk_weights)
        sums_to_one = config.norm_topk_prob or config.top_k == probs.shape[-1]
        input_weight = None
        if self.training and config.has_capacity:
            kept = self._within_capacity(chosen, tokens)
            if config.dropped_tokens == "input":
                input_weight = (gates * (chosen - kept)).sum(1, keepdim=True)
            gates, sums_to_one = gates * kept, False
        stats = None
        if with_stats:
            z = logits.logsumexp(-1, keepdim=True).square()
            own = config.own_statistics(chosen, probs, tokens, z, torch.zeros_like(z))
            if config.task_loss_coef:
                own = torch.cat([own[:1], task_loss(logits, tokens, config.shift_task_labels).view(1), own[2:]])
            stats = self.statistics(probs, gates, chosen, tokens.mask, own)
        return Routing(gates, topk_ids, stats, sums_to_one, input_weight)

    def _within_capacity(self, chosen: Tensor, tokens: Tokens) -> Tensor:
        """One where a choice is among the first `capacity` of its expert in its sequence; padding takes no place."""
        queue = chosen
        if tokens.mask is not None and not self.config.count_padding:
            queue = chosen * tokens.mask.unsqueeze(1).to(chosen.dtype)
        sequences, sums = tokens.sequences(queue), tokens.sum_by_sequence(queue)
        place = queue.cumsum(0) - (sums.cumsum(0) - sums)[sequences]
        capacity: Any = self.config.expert_capacity
        if capacity is None:
            assert self.config.capacity_factor is not None
            lengths = tokens.sum_by_sequence(torch.ones_like(queue[:, :1])).to(widest(queue))
            capacity = (self.config.capacity_factor * self.config.top_k * lengths / queue.shape[1]).ceil()[sequences]
        return chosen * (place <= capacity)


def task_loss(logits: Tensor, tokens: Tokens, shift: bool) -> Tensor:
    """Mean cross entropy of the gates with the task of each token, 0-dim; tokens without a task do not count."""
    labels = tokens.task_labels
    assert labels is not None
    if tokens.mask is not None:
        labels = labels.masked_fill(~tokens.mask, -100)
    if shift:
        sequences = tokens.sequences(labels)
        is_last = sequences.diff(append=sequences[-1:] + 1) > 0
        labels = labels.roll(-1).masked_fill(is_last, -100)
        if tokens.mask is not None:
            labels = labels.masked_fill(~tokens.mask, -100)  # padding on the left, before the first token
    has_task = labels >= 0
    picked = logits.log_softmax(-1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return -(picked * has_task).sum() / has_task.sum().clamp(min=1)
