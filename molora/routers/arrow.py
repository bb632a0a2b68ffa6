"""Arrow routing: a token goes to the experts whose product stretches it most, without a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from molora.checks import check_int, check_number
from molora.routers.base import RouterConfig, Routing, Tokens
from molora.routers.fixed_vectors import FixedVectorRouter


@dataclass(frozen=True, kw_only=True)
class Arrow(RouterConfig):
    """Gates from the absolute product of a token with one prototype for each expert; nothing is trained.

    The prototype v_i is the right singular vector of ``B_i A_i`` with the largest singular value, of unit length; the
    gates are ``softmax(|v_i . x| / router_temperature)`` over the `top_k` largest. x is not normalised. Experts that a
    module lacks are not chosen there.
    Source: Ostapenko et al., arXiv 2405.11157, section 4; PEFT 0.21, tuners/lora/arrow.py, which finds v_i by 15 power
    iterations (here exact by default: `molora.prototypes`).

    Attributes:
        top_k: experts per token; a pool of fewer experts uses all (PEFT: 3; the paper's code: all, in its example 4).
        router_temperature: > 0.
    """

    name: ClassVar[str] = "arrow"

    top_k: int = 3
    router_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k)
        check_number("router_temperature", self.router_temperature, above=0)

    def check(self, num_experts: int, r: int, placement: str) -> None:
        if placement in ("ffn", "ffn_linear"):
            raise ValueError(
                f"router 'arrow' makes its prototypes of single linears, not of placement={placement!r}; use "
                "placement='linear' or 'block'"
            )

    def num_chosen(self, num_experts: int, r: int) -> int:
        return min(self.top_k, num_experts)

    def build(self, in_features: int, num_experts: int, r: int = 0) -> ArrowRouter:
        return ArrowRouter(self, in_features, num_experts)


class ArrowRouter(FixedVectorRouter):
    """The router of `Arrow`. prototype_bits: (E, D) int32, the bits of fp32; rows of zeros where an expert is absent;
    present: (E,) bool."""

    config: Arrow
    present: Tensor
    bits = "prototype_bits"
    advice = (
        "this arrow router has no prototypes yet; they are made of the experts: import adapters with "
        "molora.from_adapters(...), or call model.set_prototypes() once the experts are trained"
    )

    def __init__(self, config: Arrow, in_features: int, num_experts: int) -> None:
        super().__init__(config, in_features, num_experts)
        self.register_buffer("present", torch.ones(num_experts, dtype=torch.bool))

    def set_vectors(self, vectors: Tensor) -> None:
        super().set_vectors(vectors)
        self.present = vectors.any(1).to(self.present.device)

    def absent(self) -> Tensor:
        return ~self.present

    def changes(self, expert: int, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        here = self.present[expert]
        return [*super().changes(expert, vector), (here, vector.any().to(here.device))]

    def has_vectors(self) -> bool:
        return super().has_vectors() or not bool(self.present.all())  # all of them may be absent

    @property
    def product_weight(self) -> Tensor:
        return self.vectors

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        self.check_set()
        scores = self.logits(x, tokens).abs() / self.config.router_temperature
        scores = scores.masked_fill(~self.present, float("-inf"))
        top, topk_ids = scores.topk(self.config.num_chosen(scores.shape[1], 0), dim=1)
        # Where every expert is absent there is nothing to add.
        gates = torch.zeros_like(scores).scatter(1, topk_ids, torch.where(self.present.any(), top.softmax(1), 0))
        stats = None
        if with_stats:
            chosen = torch.zeros_like(gates).scatter(1, topk_ids, 1.0) * self.present
            probs = torch.where(self.present.any(), scores.softmax(1), 0)
            stats = self.statistics(probs, gates, chosen, tokens.mask, gates.new_zeros(0))
        return Routing(gates, topk_ids, stats, True)
