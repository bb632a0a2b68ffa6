"""LoRA adapters as the experts of one mixture, without training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from molora.adapters.lora_files import LoraPair, read_lora
from molora.adapters.lora_match import match_lora
from molora.adapters.lora_tensors import is_finite
from molora.checks import check_int
from molora.config import MoloraConfig
from molora.context import Runtime, runtime_of
from molora.experts import lazy_zeros
from molora.layers import MoloraLayer, linear_features
from molora.linear import MixedLinear
from molora.prototypes import set_prototypes
from molora.routers import Arrow, Phatgoose, RouterConfig, router_config
from molora.suggest import unknown_key_message

Pairs = dict[str, LoraPair]

_OPTIONS = ("placement", "freeze_experts", "lora_dropout", "riemannian")
"""The keys of MoloraConfig that adapters leave open, beside the router."""


def from_adapters(
    base: nn.Module,
    adapters: Mapping[str, str | os.PathLike[str]],
    router: RouterConfig | Mapping[str, Any] | str = "arrow",
    *,
    general: Sequence[str | os.PathLike[str]] = (),
    allow_partial: bool = False,
    dtype: torch.dtype | None = None,
    adapter_name: str = "default",
    power_iterations: int | None = None,
    **options: Any,
) -> PeftModel:
    """Makes one model of many LoRA adapters of one base: each adapter is an expert, a router chooses for each token.

    Every linear that some adapter changes gets a mixture. Ranks may differ (zeros fill them up, exactly), so may
    targets (an expert is nothing where its adapter has no weights) and scalings (folded into B). Experts are frozen
    unless `freeze_experts=False`.

    Args:
        base: the causal LM that the adapters belong to; it is converted in place, as `get_peft_model` does.
        adapters: for each expert's name a PEFT LoRA: directory or hub id.
        router: "arrow" works as it is; "centroid" and "retrieval" then want `model.set_centroids(examples, tokenizer)`;
            "phatgoose" and "top_k" want their gates trained (a recipe with `mixture.adapters`).
        general: adapters of general knowledge, whose mean A and mean B are subtracted from those of every expert
            (PEFT's GenKnowSub); of the experts' rank and targets.
        allow_partial: accepts adapters whose config names modules that have no weights.
        dtype: of the experts; None: that of the adapters, and fp32 where they differ or where folding a scaling in
            would round.
        adapter_name: PEFT's name for the mixture.
        power_iterations: for arrow, see `molora.prototypes.right_singular_vectors`.
        options: more keys of MoloraConfig: placement ("linear" or "block"), freeze_experts, lora_dropout, ...

    Raises:
        ValueError: an adapter that is none, is damaged or belongs to another base, or an option that the adapters
            decide. The base is then as it was.
    """
    router = router_config({"name": "arrow", **router} if isinstance(router, Mapping) else router)
    check_options(adapters, options)
    if isinstance(general, (str, os.PathLike)):
        raise ValueError(f"general={general!r} must be a list of adapters")
    if isinstance(base, PeftModel):
        raise ValueError("from_adapters takes the base itself, not a PeftModel of it; call model.unload() first")
    if power_iterations is not None:
        check_int("power_iterations", power_iterations)
        if not isinstance(router, Arrow):
            raise ValueError(
                f"power_iterations={power_iterations} is for router 'arrow', not {router.name!r}; leave it out"
            )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r} must be a floating point dtype of torch, as torch.float32, or None")
    subtracted = [pairs_of(base, path, allow_partial) for path in general]
    # Read twice, so that one adapter is in memory at a time: now for what they are, later for their values.
    shapes: dict[str, Pairs] = {}
    dtypes = set()
    for name, path in adapters.items():
        pairs = _expert_pairs(base, name, path, allow_partial, subtracted)
        check_range(name, pairs, dtype or torch.float32)
        dtypes |= {_dtype(pair) for pair in pairs.values()} if dtype is None else {dtype}
        shapes[name] = {linear: LoraPair(p.A.to("meta"), p.B.to("meta"), p.scaling) for linear, p in pairs.items()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    config = _config(base, shapes, router, options)
    model = get_peft_model(base, config, adapter_name=adapter_name)
    layers = linears_of(runtime_of(model), adapter_name)
    for layer in layers.values():
        _empty(layer, adapter_name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once
        for e, (name, path) in enumerate(adapters.items()):
            for linear, pair in _expert_pairs(base, name, path, allow_partial, subtracted).items():
                _put(layers[linear], adapter_name, e, pair)
    if isinstance(router, Arrow):
        set_prototypes(model, adapter_name, power_iterations)
    if isinstance(router, Phatgoose):
        _mark_present(runtime_of(model), adapter_name, list(shapes.values()))
    return model


def check_options(adapters: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError for names of experts, and for options, that `from_adapters` cannot take."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(f"adapters={adapters!r} must map names of experts to PEFT LoRA adapters, at least one")
    for name, path in adapters.items():
        check_name(name)
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"adapters[{name!r}]={path!r} must be the directory or hub id of a PEFT LoRA")
    for key in options:
        if key in _OPTIONS:
            continue
        if key in [f.name for f in fields(MoloraConfig)]:
            raise ValueError(f"{key} follows from the adapters; leave it out (open are {', '.join(_OPTIONS)})")
        raise ValueError(unknown_key_message("from_adapters", key, [*_OPTIONS, "router"]))
    if options.get("placement", "linear") not in ("linear", "block"):
        raise ValueError(
            f"placement={options['placement']!r}: LoRAs of linears become experts of linears; use 'linear' or 'block'"
        )


def check_name(name: Any) -> None:
    """Raises ValueError for what cannot name an expert."""
    word = isinstance(name, str) and name.strip() and name.isprintable() and len(name) <= 100
    if not word or set(name) & set("/\\") or name.startswith(".") or name == "plain_lora":
        raise ValueError(
            f"expert name {name!r} must be a word without slashes, and not plain_lora; it names a directory on export"
        )


def pairs_of(base: nn.Module, path: str | os.PathLike[str], allow_partial: bool) -> Pairs:
    """The weights of an adapter by the linear of this base; a warning names linears that lack them."""
    pairs, missing = match_lora(read_lora(os.fspath(path)), base, allow_partial)
    if missing:
        warnings.warn(
            f"{path} has no weights for {len(missing)} of the {len(pairs) + len(missing)} linears that its config "
            f"names, first {missing[0]}; its expert is nothing there",
            stacklevel=1,  # ours, so that the command line can tell it from other libraries' warnings
        )
    return pairs


def _expert_pairs(
    base: nn.Module, name: str, path: str | os.PathLike[str], allow_partial: bool, subtracted: Sequence[Pairs]
) -> Pairs:
    """The weights of one expert: those of its adapter, without the mean A and the mean B of general adapters."""
    try:
        pairs = pairs_of(base, path, allow_partial)
    except ValueError as error:
        raise ValueError(f"expert {name!r}: {error}") from error
    if not subtracted:
        return pairs
    result: Pairs = {}
    for linear, pair in pairs.items():
        others = [g[linear] for g in subtracted if linear in g and g[linear].A.shape == pair.A.shape]
        if len(others) != len(subtracted):
            raise ValueError(
                f"expert {name!r} ({path}): general adapters must have its rank, {len(pair.A)}, on {linear}; leave "
                "them out, or give general adapters of the same rank and targets"
            )
        A = torch.stack([other.A.float() for other in others]).mean(0)
        B = torch.stack([other.B.float() for other in others]).mean(0)
        result[linear] = LoraPair(pair.A.float() - A, pair.B.float() - B, pair.scaling)
    return result


def _dtype(pair: LoraPair) -> torch.dtype:
    """The dtype that holds A and scaling * B as they are, or fp32: a power of two may still overflow or underflow."""
    if pair.A.dtype != pair.B.dtype or pair.B.dtype == torch.float32:
        return torch.float32
    B = pair.B.float() * pair.scaling
    return pair.B.dtype if torch.equal(B.to(pair.B.dtype).float(), B) else torch.float32


def _config(base: nn.Module, pools: dict[str, Pairs], router: RouterConfig, options: Mapping[str, Any]) -> MoloraConfig:
    ranks = _ranks(pools.values())
    largest = max(ranks.values())
    # The scalings are in B, so that alpha is the rank everywhere.
    pattern = {name: r for name, r in ranks.items() if r != largest}
    return MoloraConfig(
        **{"freeze_experts": True, **options},
        num_experts=len(pools),
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_short_names(base, set(ranks)),
        init_lora_weights="imported",
        router=router,
        expert_names=list(pools),
    )


def _ranks(pools: Iterable[Pairs]) -> dict[str, int]:
    """The largest rank on each module, in the order of first appearance."""
    ranks: dict[str, int] = {}
    for pool in pools:
        for name, pair in pool.items():
            ranks[name] = max(ranks.get(name, 0), len(pair.A))
    return ranks


def _short_names(base: nn.Module, names: set[str]) -> list[str]:
    """The endings of the names where they say the same, else the names."""
    leaves = {name.rpartition(".")[2] for name in names}
    same = {n for n, m in base.named_modules() if n.rpartition(".")[2] in leaves and linear_features(m) is not None}
    return sorted(leaves if {n.removesuffix(".base_layer") for n in same} == names else names)


def linears_of(runtime: Runtime, adapter: str) -> dict[str, MixedLinear]:
    """The linears of an adapter, by their name in the base."""
    base = runtime.model()
    assert base is not None
    return {n: m for n, m in base.named_modules() if isinstance(m, MixedLinear) and adapter in m.molora_specs}


def _empty(layer: MixedLinear, adapter: str, dtype: torch.dtype) -> None:
    """Zeros in the place of all experts of a linear, on its device."""
    old = experts_of(layer, adapter)
    replace_experts(layer, adapter, *(lazy_zeros(*w.shape, dtype=dtype).to(w.device) for w in old))


def check_range(name: str, pool: Pairs, dtype: torch.dtype) -> None:
    """Raises ValueError where an expert has values that a dtype turns into infinity."""
    for linear, pair in pool.items():
        values = (pair.A.float(), pair.B.float() * pair.scaling)
        if not all(is_finite(value.to(dtype)) for value in values):
            raise ValueError(
                f"expert {name!r}: {linear} has values beyond the range of {dtype}; make the model with "
                "from_adapters(..., dtype=torch.float32)"
            )


def _mark_present(runtime: Runtime, adapter: str, pools: Sequence[Pairs]) -> None:
    """Tells each router which experts have weights on a linear that it routes."""
    routed: dict[MoloraLayer | None, list[str]] = {}
    for name, layer in linears_of(runtime, adapter).items():
        shared = layer.molora_shared.get(adapter)
        routed.setdefault(layer if shared is None else shared.owner, []).append(name)
    for site in runtime.sites:
        if site.adapter == adapter and site.owner is not None:
            present: Any = site.router.present
            present.copy_(torch.tensor([any(name in pool for name in routed[site.owner]) for pool in pools]))


@torch.no_grad()
def _put(layer: MixedLinear, adapter: str, e: int, pair: LoraPair) -> None:
    """The weights of expert `e` of a linear."""
    A, B = (getattr(layer, container)[adapter].weight for container in ("molora_A", "molora_B"))
    A[e, : len(pair.A)] = pair.A.to(A.device)
    B[e, : len(pair.A)] = (pair.B.T.to(B.device).float() * pair.scaling).to(B.dtype)


def experts_of(layer: MoloraLayer, adapter: str) -> list[Tensor]:
    """A (E, R, D) and B (E, R, O) of a linear, as they are kept, without autograd."""
    return [getattr(layer, container)[adapter].weight.detach() for container in ("molora_A", "molora_B")]


def replace_experts(layer: MoloraLayer, adapter: str, A: Tensor, B: Tensor) -> None:
    """Other A (E, R, D) and B (E, R, O), of any E and R, for a linear."""
    for container, value in (("molora_A", A), ("molora_B", B)):
        module = getattr(layer, container)[adapter]
        module.weight = nn.Parameter(value.to(module.weight.device), requires_grad=module.weight.requires_grad)
