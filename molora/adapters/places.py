"""The places of a pool of experts: made, vacated and named, while the model is in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from molora.adapters.from_adapters import experts_of, linears_of, replace_experts
from molora.context import Runtime, adapter_of
from molora.linear import MixedLinear
from molora.routers.fixed_vectors import FixedVectorRouter

VACANT = ""
"""The name of a place of a pool that no expert has. Its vectors are zeros, so that its router gives it nothing."""
Pause = Callable[[bool], AbstractContextManager[None]]
"""Told whether tensors of the model are replaced in it."""
Changes = list[tuple[Tensor, Tensor]]
"""Tensors, and what is to be copied into them."""


def no_pause(moves: bool) -> AbstractContextManager[None]:
    return nullcontext()


@torch.no_grad()
def vacate_expert(model: Any, name: str, pause: Pause = no_pause) -> None:
    """`delete_expert`, but the place is left vacant and no tensor is replaced: the next expert may have it.

    Args:
        pause: no forward may run in it.

    Raises:
        ValueError: as `delete_expert`.
    """
    runtime, adapter, config = pool_of(model, None)
    place = place_to_leave(config, adapter, name)
    changes: Changes = []
    for router in routers_of(runtime, adapter).values():
        changes += router.changes(place, torch.zeros_like(router.vectors[place]))
    with pause(False):
        apply_changes(changes)
        config.expert_names[place] = VACANT
        forget_use(runtime, adapter)
    # Beside forwards again. Where products overflow, a gate of zero makes them NaN, not nothing.
    layers = linears_of(runtime, adapter).values()
    torch._foreach_zero_([weight[place] for layer in layers for weight in experts_of(layer, adapter)])


@torch.no_grad()
def reserve_places(model: Any, count: int) -> None:
    """Makes vacant places for so many experts, of the ranks of those that are there, so that adding them replaces no
    tensor of the model. They take memory and, as any expert that is not chosen, a part of the time of a token.

    Raises:
        ValueError: a router that would have to be trained for its experts.
    """
    runtime, adapter, config = pool_of(model, None)
    make_places(runtime, adapter, config, count, {})


def pool_of(model: Any, adapter_name: str | None) -> tuple[Runtime, str, Any]:
    """The runtime, name and config of an adapter whose experts may come and go; the active adapter if None.

    Raises:
        ValueError: a model without a mixture, or one whose experts may not: not made of LoRAs, a shared basis, a
            router that is trained for them.
    """
    runtime, adapter, config = adapter_of(model, adapter_name, "whose experts could change")
    if not config.expert_names or config.init_lora_weights != "imported":
        raise ValueError(f"adapter {adapter!r} was not made of LoRA adapters; make it with from_adapters")
    if config.shared_basis:
        raise ValueError(f"the experts of adapter {adapter!r} share a basis; change the pool, then compress it again")
    if not all(isinstance(router, FixedVectorRouter) for router in routers_of(runtime, adapter).values()):
        raise ValueError(
            f"router {config.router.name!r} is trained for its experts; make the model anew with from_adapters, and "
            "train the gates"
        )
    return runtime, adapter, config


def place_to_leave(config: Any, adapter: str, name: str) -> int:
    """The place of an expert that may go.

    Raises:
        ValueError: an unknown name, the last expert, or fewer experts than the router chooses.
    """
    there = [other for other in config.expert_names if other != VACANT]
    if name not in there:
        raise ValueError(f"there is no expert {name!r}; there are {', '.join(there)}")
    if len(there) == 1:
        raise ValueError(f"{name!r} is the last expert; delete the adapter {adapter!r} instead")
    config.router.check(len(there) - 1, config.r, config.placement)
    return int(config.expert_names.index(name))


def make_places(runtime: Runtime, adapter: str, config: Any, count: int, ranks: Mapping[MixedLinear, int]) -> None:
    """So many vacant places more, and in each linear at least so many ranks, both of zeros. Where memory runs out the
    model is as it was."""
    made = {}
    for layer in linears_of(runtime, adapter).values():
        spec = layer.molora_specs[adapter][""]
        r = max(spec.r, ranks.get(layer, 0))
        weights = [pad(weight, (0, 0, 0, r - spec.r, 0, count)) for weight in experts_of(layer, adapter)]
        made[layer] = replace(spec, r=r, lora_alpha=r), weights
    for layer, (spec, weights) in made.items():
        layer.molora_specs[adapter][""] = spec
        replace_experts(layer, adapter, *weights)
    vectors = {site: pad(router.vectors, (0, 0, 0, count)) for site, router in routers_of(runtime, adapter).items()}
    renew(runtime, adapter, config, [*config.expert_names, *[VACANT] * count], vectors)


def routers_of(runtime: Runtime, adapter: str) -> dict[str, Any]:
    """The routers of an adapter, by name."""
    return {site.name: site.router for site in runtime.sites if site.adapter == adapter and site.owner is not None}


def renew(runtime: Runtime, adapter: str, config: Any, names: list[str], vectors: Mapping[str, Tensor]) -> None:
    """Writes the experts there are now into config, layers, routers and telemetry."""
    linears = linears_of(runtime, adapter)
    for layer in linears.values():
        layer.molora_specs[adapter][""] = replace(layer.molora_specs[adapter][""], num_experts=len(names))
    ranks = {linear: layer.molora_specs[adapter][""].r for linear, layer in linears.items()}
    config.expert_names, config.num_experts, config.r = names, len(names), max(ranks.values())
    config.lora_alpha = config.r
    config.rank_pattern = {linear: r for linear, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    for site, router in routers_of(runtime, adapter).items():
        router.set_vectors(vectors[site])
    forget_use(runtime, adapter)


def forget_use(runtime: Runtime, adapter: str) -> None:
    """Counts of what tokens chose were of other experts."""
    for number, site in enumerate(runtime.sites):
        if site.adapter == adapter and site.owner is not None:
            runtime.use.pop(number, None)
            runtime.window.counts.pop(number, None)


def apply_changes(changes: Changes) -> None:
    """Copies, in few launches."""
    for dtype in {old.dtype for old, _ in changes}:
        pairs = [(old, new) for old, new in changes if old.dtype == dtype]
        torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
