"""The balance loss that most routers share: ``coef * E * sum_i F_i P_i``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from molora.checks import check_bool, check_choice, check_number
from molora.routers.base import RouterConfig, RouterLosses, SiteStats, Tokens, masked_mean


@dataclass(frozen=True, kw_only=True)
class BalancedRouterConfig(RouterConfig):
    """A router with a Switch-type balance loss ``router_aux_loss_coef * E * sum_i F_i P_i``.

    F_i says how often expert i is used and P_i is its mean probability. Where a router counts choices, F carries no
    gradient and the loss moves P; soft F (`soft_load`) carries one too.

    Attributes:
        router_aux_loss_coef: weight of the loss, >= 0.
        balance_pool: F and P are means over all routers of the model ("model": MixLoRA, DynMoLE), over those of a
            decoder layer ("layer": MoLA), or of one router ("router": AdaMoLE), and multiplied then.
        balance_reduction: "mean" or "sum" over the pools.
        balance_over: which tokens F is counted over. "micro": those of the micro-batch on this rank, as P; the gradient
            is that of the loss. "ranks": those of the micro-batch on all ranks. "window": those of all micro-batches of
            the optimiser step so far, on all ranks (Qwen's global-batch balance, arXiv 2501.11873). P stays that of the
            micro-batch on this rank. With "ranks", the average over ranks of equally many tokens is the gradient of the
            loss of the whole micro-batch. With "window" it is not that of the whole step: early micro-batches see an F
            of few tokens. "sample": F and P of each row by itself, and the mean over rows (LLaVA-MoLE).
        count_padding: padding counts in the losses, as in several released codes. Telemetry leaves it out always.
    """

    soft_load: ClassVar[bool] = False

    router_aux_loss_coef: float = 1e-3
    balance_pool: str = "model"
    balance_reduction: str = "mean"
    balance_over: str = "micro"
    count_padding: bool = False

    def __post_init__(self) -> None:
        check_number("router_aux_loss_coef", self.router_aux_loss_coef, at_least=0)
        check_choice("balance_pool", self.balance_pool, ("model", "layer", "router"))
        check_choice("balance_reduction", self.balance_reduction, ("mean", "sum"))
        check_choice("balance_over", self.balance_over, ("micro", "ranks", "window", "sample"))
        check_bool("count_padding", self.count_padding)

    @property
    def pool_over(self) -> str:
        return self.balance_over if self.balance_over in ("ranks", "window") else "micro"

    def own_statistics(self, load: Tensor, probs: Tensor, tokens: Tokens, *extra: Tensor) -> Tensor:
        """What the losses are made of: means of `extra` (each (T, 1)), then of load and probs (T, E), flat.

        For balance_over "sample" load and probs are (sequences, E) each.
        """
        mask = None if self.count_padding else tokens.mask
        parts = [masked_mean(torch.cat(extra, 1), mask)] if extra else []
        both = torch.cat([load if self.soft_load else load.detach(), probs], 1)
        if self.balance_over == "sample":
            weight = torch.ones_like(both[:, :1]) if mask is None else mask.unsqueeze(1).to(both.dtype)
            counts = tokens.sum_by_sequence(weight).clamp(min=1)
            parts.append((tokens.sum_by_sequence(both * weight) / counts).flatten())
        else:
            parts.append(masked_mean(both, mask))
        return torch.cat(parts)

    def split_own(self, own: Tensor, num_gates: int, extra: int) -> tuple[Tensor, Tensor, Tensor]:
        """(extra means (n,), F (B, E), P (B, E)) of `own_statistics`; B is 1 but for balance_over "sample"."""
        both = own[extra:].view(-1, 2, num_gates)
        return own[:extra], both[:, 0], both[:, 1]

    def balance(self, sites: Sequence[SiteStats], extra: int = 0, extra_coefs: Sequence[float] = ()) -> RouterLosses:
        """The balance loss, and the losses ``coef * mean over routers`` of the extra means."""
        grads: list[Tensor] = [sites[0].own] * len(sites)
        value = sites[0].own.new_zeros(())
        pools: dict[object, list[int]] = {}
        for i, site in enumerate(sites):
            key = {"model": None, "layer": site.layer, "router": i}[self.balance_pool]
            pools.setdefault(key, []).append(i)
        scale = self.router_aux_loss_coef / (len(pools) if self.balance_reduction == "mean" else 1)
        for members in pools.values():
            # (n, ...) for the n routers of the pool: a model has hundreds, so nothing is done one by one.
            own, num_experts = torch.stack([sites[i].own for i in members]), sites[members[0]].num_gates
            grad = torch.zeros_like(own)
            for column, coef in enumerate(extra_coefs):
                if coef:
                    value = value + coef / len(sites) * own[:, column].sum()
                    grad[:, column] = coef / len(sites)
            loads, probs = own[:, extra:].view(len(members), -1, 2, num_experts).unbind(2)
            pooled = [f for i in members if (f := sites[i].pooled) is not None]
            load = (torch.stack(pooled).unsqueeze(1) if pooled else loads).mean(0)
            prob = probs.mean(0)
            weight = scale * num_experts / load.shape[0]
            value = value + weight * (load * prob).sum()
            grad_loads, grad_probs = grad[:, extra:].view(len(members), -1, 2, num_experts).unbind(2)
            grad_probs.copy_(load * (weight / len(members)))
            if self.soft_load:
                moved = prob * (weight / len(members))
                shares = [s for i in members if (s := sites[i].share) is not None]
                grad_loads.copy_(moved * torch.stack(shares).view(-1, 1, 1) if shares else moved)
            for i, row in zip(members, grad.unbind(), strict=True):
                grads[i] = row
        return RouterLosses(value, grads)

    @property
    def counts_padding(self) -> bool:
        return self.count_padding

    def pooled_own(self, own: Tensor, num_gates: int) -> Tensor:
        """F (E,)."""
        return own[-2 * num_gates : -num_gates]

    def describe_own(self, own: Tensor, num_gates: int) -> dict[str, Tensor]:
        return {"mean_probability": own[-num_gates:]} if self.balance_over != "sample" else {}
