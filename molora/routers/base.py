"""What a router is: hidden states in, gates out. A router knows no kernel and no model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router decides for T tokens.

    Attributes:
        gates: (T, G) fp32 (fp64 for fp64 input), zero where an expert is not chosen. G = E, or E*R for rank-wise.
        topk_ids: (T, K) int64, the chosen experts where each token has exactly K of them, else None.
        stats: (S,) means over the tokens that count, in the router's own order: what its losses and its telemetry are
            made of. Differentiable where a loss needs it. None unless they were asked for.
        sums_to_one: whether every token's gates sum to one by construction.
    """

    gates: Tensor
    topk_ids: Tensor | None
    stats: Tensor | None
    sums_to_one: bool


class RouterLosses(NamedTuple):
    """The router losses of one forward.

    Attributes:
        value: 0-dim, the sum of all losses, each times its coefficient.
        grads: for each layer the gradient (S,) of `value` with respect to its statistics.
    """

    value: Tensor
    grads: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of the typed router configs; `name` is the word that stands for the class in JSON and YAML."""

    name: ClassVar[str]

    def check(self, num_experts: int) -> None:
        """Raises ValueError where this config cannot route among `num_experts` experts."""

    def build(self, in_features: int, num_experts: int) -> Router:
        """A new router for inputs of size `in_features`, on the default device, in fp32."""
        raise NotImplementedError

    def losses(self, stats: Sequence[Tensor]) -> RouterLosses:
        """The losses as a function of the statistics of all layers, with its gradient in closed form.

        In closed form because it is computed inside an opaque operator, during a backward, where autograd is off.

        Args:
            stats: one (S,) tensor for each layer, detached.
        """
        raise NotImplementedError

    def describe(self, stats: Tensor) -> dict[str, Tensor]:
        """Names the parts of one layer's statistics; ``"load"`` (E,) is the share of choices each expert got."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `molora.routers.router_config` turns back into an equal config."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}


class Router(nn.Module):
    """Base of the routers: a bias-free linear to one logit for each expert, computed in fp32 outside autocast."""

    def __init__(self, config: RouterConfig, in_features: int, num_experts: int, init_std: float) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, dtype=torch.float32))
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, with_stats: bool = False) -> Routing:
        """Routes each token by itself.

        Args:
            x: (T, D), any floating dtype.
            token_mask: (T,) bool, True where a token counts in the statistics; None means all count.
            with_stats: whether to compute the statistics.
        """
        with no_autocast(x.device):
            return self.route(x, token_mask, with_stats)

    def route(self, x: Tensor, token_mask: Tensor | None, with_stats: bool) -> Routing:
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """``x W^T`` (T, E), accumulated in fp64 and rounded once to fp32 (fp64 input stays fp64).

        An fp32 GEMM gives a row other last bits alone than in a batch, and top-k turns one such bit into another
        expert; the rounding of an fp64 sum does not depend on the batch. Devices without fp64 accumulate in fp32.
        """
        accumulate = torch.float32 if x.device.type == "mps" else torch.float64
        result = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (x.to(accumulate) @ self.weight.to(accumulate).T).to(result)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off for `device`: a cast to fp32 alone is undone by an enclosing autocast."""
    return torch.autocast(device.type, enabled=False)


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """The mean over tokens that count: (T, n) to (n,); zero where none counts. No host sync."""
    if token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    weight = token_mask.to(values.dtype).unsqueeze(1)
    return (values * weight).sum(0) / weight.sum().clamp(min=1)
