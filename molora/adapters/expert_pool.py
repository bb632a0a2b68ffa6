"""One expert more or less in a mixture of LoRA adapters, while the model is in use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from molora.adapters.from_adapters import check_name, check_range, linears_of, pairs_of, replace_experts
from molora.adapters.lora_files import LoraPair
from molora.centroids import check_texts, example_vectors
from molora.context import Runtime, adapter_of
from molora.linear import MixedLinear
from molora.prototypes import prototypes
from molora.routers.fixed_vectors import FixedVectorRouter


def add_expert(
    model: Any,
    name: str,
    path: str | os.PathLike[str],
    *,
    examples: Sequence[str] | None = None,
    tokenizer: Any = None,
    allow_partial: bool = False,
    adapter_name: str | None = None,
) -> None:
    """Adds a LoRA adapter as one more expert of a mixture whose router needs no training.

    The weights are rounded to the dtype of the experts that are there.

    Args:
        model: made by `from_adapters`, or loaded from what it saved.
        name: of the new expert.
        path: a PEFT LoRA of the same base: directory or hub id. It may leave linears out, and may not have others.
        examples, tokenizer: example prompts of the new expert, for routers "centroid" and "retrieval".
        allow_partial: see `from_adapters`.
        adapter_name: the active adapter if None.

    Raises:
        ValueError: a name that is taken, a router that would have to be trained, an adapter that is refused; the model
            is then as it was.
    """
    runtime, adapter, config = _pool_of(model, adapter_name)
    check_name(name)
    if name in config.expert_names:
        raise ValueError(f"there is an expert {name!r} already; delete it first, or choose another name")
    if config.router.has_centroids and (not examples or isinstance(examples, str) or tokenizer is None):
        raise ValueError(
            f"router {config.router.name!r} knows experts by example prompts; call add_expert(name, path, "
            "examples=[...], tokenizer=tokenizer)"
        )
    if examples is not None:
        check_texts(name, examples)
    for site in runtime.sites:
        if site.adapter == adapter and site.owner is not None:
            site.router.check_set()  # type: ignore[operator]
    base = runtime.model()
    assert base is not None
    try:
        pairs = pairs_of(base, path, allow_partial)
    except ValueError as error:
        raise ValueError(f"expert {name!r}: {error}") from error
    linears = linears_of(runtime, adapter)
    if strange := [linear for linear in pairs if linear not in linears]:
        raise ValueError(
            f"expert {name!r} ({path}) adapts {len(strange)} linears that no expert of this model does, first "
            f"{strange[0]}; make the model anew with from_adapters"
        )
    first: Any = next(iter(linears.values()))
    check_range(name, pairs, first.molora_A[adapter].weight.dtype)
    new = None
    if config.router.has_centroids:
        new = example_vectors(base, runtime, adapter, config.router, {name: examples or ()}, tokenizer)
    for linear, layer in linears.items():
        _append(layer, adapter, pairs.get(linear))
    if new is None:
        new = prototypes(runtime, adapter, experts=slice(-1, None))
    old = _vectors(runtime, adapter)
    _renew(runtime, adapter, config, [*config.expert_names, name], {
        site: torch.cat([old[site], vectors.to(old[site])]) for site, vectors in new.items()
    })  # fmt: skip


def delete_expert(model: Any, name: str, *, adapter_name: str | None = None) -> None:
    """Takes an expert out of a mixture whose router needs no training.

    Raises:
        ValueError: an unknown name, the last expert, or a router that would have to be trained.
    """
    runtime, adapter, config = _pool_of(model, adapter_name)
    names: list[str] = list(config.expert_names)
    if name not in names:
        raise ValueError(f"there is no expert {name!r}; there are {', '.join(names)}")
    if len(names) == 1:
        raise ValueError(f"{name!r} is the last expert; delete the adapter {adapter!r} instead")
    kept = [i for i, other in enumerate(names) if other != name]
    config.router.check(len(kept), config.r, config.placement)
    for layer in linears_of(runtime, adapter).values():
        A, B = (getattr(layer, c)[adapter].weight.detach() for c in ("molora_A", "molora_B"))
        replace_experts(layer, adapter, A[kept], B[kept])
    vectors = {site: old[kept] for site, old in _vectors(runtime, adapter).items()}
    _renew(runtime, adapter, config, [names[i] for i in kept], vectors)


def _pool_of(model: Any, adapter_name: str | None) -> tuple[Runtime, str, Any]:
    runtime, adapter, config = adapter_of(model, adapter_name, "whose experts could change")
    if not config.expert_names or config.init_lora_weights != "imported":
        raise ValueError(f"adapter {adapter!r} was not made of LoRA adapters; make it with from_adapters")
    if config.shared_basis:
        raise ValueError(f"the experts of adapter {adapter!r} share a basis; change the pool, then compress it again")
    sites = [site for site in runtime.sites if site.adapter == adapter and site.owner is not None]
    if not all(isinstance(site.router, FixedVectorRouter) for site in sites):
        raise ValueError(
            f"router {config.router.name!r} is trained for its experts; make the model anew with from_adapters, and "
            "train the gates"
        )
    return runtime, adapter, config


@torch.no_grad()
def _append(layer: MixedLinear, adapter: str, pair: LoraPair | None) -> None:
    spec = layer.molora_specs[adapter][""]
    r = spec.r if pair is None else max(spec.r, len(pair.A))
    layer.molora_specs[adapter][""] = replace(spec, r=r, lora_alpha=r)
    old = [getattr(layer, c)[adapter].weight.detach() for c in ("molora_A", "molora_B")]
    A, B = (torch.zeros(len(w) + 1, r, w.shape[2], dtype=w.dtype, device=w.device) for w in old)
    for new, w in zip((A, B), old, strict=True):
        new[:-1, : spec.r] = w
    if pair is not None:
        A[-1, : len(pair.A)] = pair.A.to(A.device)
        B[-1, : len(pair.A)] = pair.B.T.to(B.device).float() * pair.scaling
    replace_experts(layer, adapter, A, B)


def _vectors(runtime: Runtime, adapter: str) -> dict[str, Tensor]:
    sites: list[Any] = [site for site in runtime.sites if site.adapter == adapter and site.owner is not None]
    return {site.name: site.router.vectors for site in sites}


def _renew(runtime: Runtime, adapter: str, config: Any, names: list[str], vectors: Mapping[str, Tensor]) -> None:
    """Writes the experts there are now into config, layers, routers and telemetry."""
    linears = linears_of(runtime, adapter)
    for layer in linears.values():
        layer.molora_specs[adapter][""] = replace(layer.molora_specs[adapter][""], num_experts=len(names))
    ranks = {linear: layer.molora_specs[adapter][""].r for linear, layer in linears.items()}
    config.expert_names, config.num_experts, config.r = names, len(names), max(ranks.values())
    config.lora_alpha = config.r
    config.rank_pattern = {linear: r for linear, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    for number, site in enumerate(runtime.sites):
        if site.adapter == adapter and site.owner is not None:
            site.router.set_vectors(vectors[site.name])  # type: ignore[operator]
            runtime.use.pop(number, None)
            runtime.window.counts.pop(number, None)
