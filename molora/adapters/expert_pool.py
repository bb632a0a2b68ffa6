"""One expert more or less in a mixture of LoRA adapters, while the model is in use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    new = prepare_expert(
        model,
        name,
        path,
        examples=examples,
        tokenizer=tokenizer,
        allow_partial=allow_partial,
        adapter_name=adapter_name,
    )
    new.add()


@dataclass(frozen=True, kw_only=True)
class NewExpert:
    """An expert that was read and checked for a pool; it is in the pool from `add` on.

    Attributes:
        weights: for each linear of the pool A (1, R, D) and B (1, R, O), zeros where the adapter leaves it out.
        vectors: for each router, by name, the expert's (1, D'); None: `add` makes them of its example prompts, for
            which it runs the model.
        others: the experts that were there.
    """

    name: str
    runtime: Runtime
    adapter: str
    config: Any
    weights: Mapping[MixedLinear, tuple[Tensor, Tensor]]
    vectors: Mapping[str, Tensor] | None
    others: tuple[str, ...]
    examples: Sequence[str]
    tokenizer: Any

    @torch.no_grad()
    def add(self) -> None:
        """Puts the expert into its pool: no forward may run meanwhile.

        Raises:
            ValueError: the pool changed since the expert was prepared.
        """
        runtime, adapter, config = self.runtime, self.adapter, self.config
        if tuple(config.expert_names) != self.others:
            raise ValueError(f"the pool changed while expert {self.name!r} was read; add it again")
        vectors = self.vectors
        if vectors is None:
            examples, base = {self.name: self.examples}, runtime.model()
            assert base is not None
            vectors = example_vectors(base, runtime, adapter, config.router, examples, self.tokenizer)
        for layer, weights in self.weights.items():
            _append(layer, adapter, *weights)
        old = _vectors(runtime, adapter)
        _renew(runtime, adapter, config, [*self.others, self.name], {
            site: torch.cat([old[site], new.to(old[site])]) for site, new in vectors.items()
        })  # fmt: skip


@torch.no_grad()
def prepare_expert(
    model: Any,
    name: str,
    path: str | os.PathLike[str],
    *,
    examples: Sequence[str] | None = None,
    tokenizer: Any = None,
    allow_partial: bool = False,
    adapter_name: str | None = None,
) -> NewExpert:
    """What takes time of `add_expert`, with its arguments and errors: reading, checking, prototypes. It changes nothing
    and may run beside forwards of the model."""
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
    weights = {layer: _weights(layer, adapter, pairs.get(linear)) for linear, layer in linears.items()}
    return NewExpert(
        name=name,
        runtime=runtime,
        adapter=adapter,
        config=config,
        weights=weights,
        vectors=None if config.router.has_centroids else prototypes(runtime, adapter, experts=weights),
        others=tuple(config.expert_names),
        examples=examples or (),
        tokenizer=tokenizer,
    )


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


def _weights(layer: MixedLinear, adapter: str, pair: LoraPair | None) -> tuple[Tensor, Tensor]:
    """A (1, R, D) and B (1, R, O) of one expert for a linear, of its rank there or a higher one."""
    r = layer.molora_specs[adapter][""].r if pair is None else max(layer.molora_specs[adapter][""].r, len(pair.A))
    old = [getattr(layer, c)[adapter].weight.detach() for c in ("molora_A", "molora_B")]
    A, B = (torch.zeros(1, r, w.shape[2], dtype=w.dtype, device=w.device) for w in old)
    if pair is not None:
        A[0, : len(pair.A)] = pair.A.to(A.device)
        B[0, : len(pair.A)] = pair.B.T.to(B.device).float() * pair.scaling
    return A, B


def _append(layer: MixedLinear, adapter: str, *new: Tensor) -> None:
    """One expert more, of the rank of the others or a higher one, to which they are then filled up with zeros."""
    spec, r = layer.molora_specs[adapter][""], new[0].shape[1]
    layer.molora_specs[adapter][""] = replace(spec, r=r, lora_alpha=r)
    old = [getattr(layer, c)[adapter].weight.detach() for c in ("molora_A", "molora_B")]
    filled = [torch.nn.functional.pad(w, (0, 0, 0, r - spec.r)) for w in old]
    replace_experts(layer, adapter, *(torch.cat(both) for both in zip(filled, new, strict=True)))


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
