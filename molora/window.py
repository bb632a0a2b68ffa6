"""What accumulates between two optimiser steps, and the hook that says that one was taken.

A forward changes no state, because activation checkpointing runs it twice. The choices of every micro-batch wait here;
when an optimiser of this model steps, they are summed over ranks and handed to `Router.move`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from molora.routers import Router, RouterConfig, SiteStats


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes; the values themselves in a single one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


class Window:
    """The micro-batches since the last optimiser step.

    Attributes:
        counts: for each router (by its number) how many tokens chose each gate, (G,) int64, on this rank.
        loads: for each adapter ``[tokens, tokens * F of each router]``, summed over ranks.
    """

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.loads: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.counts or self.loads)

    def count(self, sites: Sequence[int], tokens: Tensor, loads: Tensor) -> None:
        """Adds the choices of one micro-batch: for each router the tokens that counted, (n,), and choices per token,
        (n, G)."""
        counts = (loads.double() * tokens.double().unsqueeze(1)).round().to(torch.int64)
        for site, row in zip(sites, counts, strict=True):
            self.counts[site] = self.counts[site] + row if site in self.counts else row

    def pool(self, adapter: str, config: RouterConfig, sites: Sequence[SiteStats], tokens: Tensor) -> list[SiteStats]:
        """The statistics with F averaged over what `balance_over` names; one all-reduce for all routers."""
        loads = [config.pooled_own(site.own, site.num_gates) for site in sites]
        total = torch.cat([tokens.view(1), tokens * torch.cat(loads)])
        total = sum_over_ranks(total.clone())
        if config.pool_over == "window":
            before = self.loads.get(adapter)
            total = total if before is None or before.shape != total.shape else total + before
            self.loads[adapter] = total
        share = tokens / total[0].clamp(min=1)
        pooled = (total[1:] / total[0].clamp(min=1)).split([len(load) for load in loads])
        return [site._replace(pooled=p, share=share) for site, p in zip(sites, pooled, strict=True)]

    def close(self, routers: Callable[[int], Router]) -> None:
        """Hands each router its choices, summed over ranks, and forgets them."""
        if self.counts:
            order = sorted(self.counts)
            device = self.counts[order[0]].device  # a model may lie on several
            counts = sum_over_ranks(torch.cat([self.counts[site].to(device) for site in order]))
            for site, part in zip(order, counts.split([len(self.counts[s]) for s in order]), strict=True):
                router = routers(site)
                router.move(part.to(next(router.buffers()).device))
        self.counts, self.loads = {}, {}


def on_optimizer_step(owner: Any, ended: Callable[[Any, torch.optim.Optimizer], None]) -> None:
    """Calls ``ended(owner, optimizer)`` after each step of any torch optimizer, as long as `owner` lives.

    torch's global hook, because nobody hands a PEFT method its optimizer: it also sees the inner optimizers of
    DeepSpeed's engines and of accelerate's wrappers.
    """

    def after(reference: weakref.ref[Any], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        target = reference()
        if target is not None:
            ended(target, optimizer)

    handle = register_optimizer_step_post_hook(partial(after, weakref.ref(owner)))
    weakref.finalize(owner, handle.remove)


def steps_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether this optimizer trains any of these parameters.

    DeepSpeed's inner optimizers hold flat copies; its mark on the parameters has to do for those.
    """
    own = {id(p): p for p in parameters if p.requires_grad}
    if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        return True
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in own.values())
