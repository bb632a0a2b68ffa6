"""Which modules a config converts, and into what: decided, and refused, before anything is replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from molora.config import REGIONS, MoloraConfig
from molora.ffn import MixedFFN
from molora.ffn_structure import FFNStructure, looks_like_ffn, probe_ffn
from molora.layers import MixtureSpec, MoloraLayer, RouterPlace, linear_features
from molora.routers import Centroid, Retrieval, RouterConfig
from molora.targets import in_layers, layer_index, matches, select_modules

# Names under which siblings read the same input: attention's three, and the two before a gated activation.
_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


@dataclass(frozen=True)
class LinearPlan:
    """A linear to convert.

    Attributes:
        reads: names the group of linears that read the same input.
        block: names the group whose router it shares, if it shares one.
    """

    place: RouterPlace
    spec: MixtureSpec
    reads: str
    block: str | None = None


@dataclass(frozen=True)
class FFNPlan:
    """An FFN to convert; `specs` holds the projections that get experts, by the name of their module."""

    place: RouterPlace
    structure: FFNStructure
    specs: dict[str, MixtureSpec]
    by_projection: bool = False
    block: str | None = None


Plan = dict[str, LinearPlan | FFNPlan]


def plan_conversion(model: nn.Module, config: MoloraConfig) -> Plan:
    """The modules that `config` converts in `model`, by their full name.

    Raises:
        ValueError: see `MoloraModel`.
    """
    _refuse_mixture_of_experts(model)
    linears, ffns = _modules(model)
    spec = _spec(config)
    if config.placement in ("ffn", "ffn_linear"):
        plan = _plan_ffns(model, config, ffns, spec)
    else:
        _refuse_inside_ffns(model, config, config.target_modules, config.exclude_modules)
        plan = _plan_linears(model, config, _of_region(config.target_modules, linears, ffns, ""), spec)
    _set_num_experts(model, config, plan)
    for name, entry in plan.items():
        _check_router(name, entry, config)
    if isinstance(config.router, Centroid | Retrieval) and config.router.reads_embedding:
        place = query_place(model, config.router, plan)
        for name, entry in plan.items():
            # A prompt is embedded before the model runs, a token's hidden state is there once its layer has run.
            before = place.layer is not None and (entry.place.layer or 0) < place.layer
            early = before and isinstance(config.router, Centroid)
            plan[name] = replace(entry, place=replace(place, early=early), block=place.name)
    if config.plain_lora is not None:
        own = _of_region(config.plain_lora["target_modules"], linears, ffns, "plain_lora.")
        plan |= _plan_plain_lora(model, config, own, plan, spec)
    return plan


def _of_region(
    targets: list[str] | str | None, linears: dict[str, nn.Module], ffns: dict[str, nn.Module], key: str
) -> dict[str, nn.Module]:
    """The linears that the words "ffn-linear" and "attention-linear" choose among: those inside FFNs, or the others."""
    if targets not in REGIONS:
        return linears
    inside = tuple(f"{name}." for name, module in ffns.items() if _is_ffn(module))
    if not inside:
        raise ValueError(
            f"{key}target_modules={targets!r}: this model has no FFN module of its own whose linears could be told "
            "from the others; name the linears instead"
        )
    return {n: m for n, m in linears.items() if n.startswith(inside) == (targets == "ffn-linear")}


def _is_ffn(module: nn.Module) -> bool:
    try:
        return isinstance(module, MixedFFN) or bool(probe_ffn(module))
    except ValueError:
        return False


def _refuse_inside_ffns(
    model: nn.Module, config: MoloraConfig, targets: list[str] | str | None, excluded: list[str] | str | None
) -> None:
    """Refuses linears inside an FFN that another adapter has converted as a whole: they are not there to convert."""
    for name, module in model.named_modules():
        if not isinstance(module, MixedFFN) or targets == "attention-linear":
            continue
        for child in module.structure.names.values():
            linear = f"{name}.{child}"
            wanted = targets == "ffn-linear" or matches(targets, linear)
            if wanted and not matches(excluded, linear) and in_layers(linear, config):
                raise ValueError(
                    f"adapter {sorted(module.molora_specs)[0]!r} has converted {name} as a whole FFN, so {linear} "
                    "cannot have experts of its own; add the adapter of linears first, or target 'attention-linear'"
                )


def _set_num_experts(model: nn.Module, config: MoloraConfig, plan: Plan) -> None:
    """Gives each entry the number of experts of its decoder layer, where the config has a list of them (MoLA)."""
    if isinstance(config.num_experts, int):
        return
    counts = config.num_experts
    layers = {name: layer_index(name, config.layers_pattern) for name, _ in model.named_modules()}
    depth = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    if len(counts) not in (4, depth):
        raise ValueError(
            f"num_experts={counts} has {len(counts)} numbers; give one for each of the {depth} decoder layers, or "
            "four, for the quarters of the depth"
        )
    for name, entry in plan.items():
        layer = layers[name]
        if layer is None:
            raise ValueError(f"num_experts={counts} is by decoder layer, but {name} is in none; exclude it")
        own = counts[layer] if len(counts) == depth else counts[layer * 4 // depth]
        if isinstance(entry, FFNPlan):
            specs = {child: replace(spec, num_experts=own) for child, spec in entry.specs.items()}
            plan[name] = replace(entry, specs=specs)
        else:
            plan[name] = replace(entry, spec=replace(entry.spec, num_experts=own))


def _check_router(name: str, entry: LinearPlan | FFNPlan, config: MoloraConfig) -> None:
    """Checks the router against what this module got: rank_pattern and expert counts may differ by module."""
    spec = entry.spec if isinstance(entry, LinearPlan) else next(iter(entry.specs.values()))
    assert spec.router is not None
    try:
        spec.router.check(spec.num_experts, spec.r, config.placement)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def query_place(model: nn.Module, router: Centroid | Retrieval, plan: Plan) -> RouterPlace:
    """Where the one router of a model sits whose query is not its module's own input."""
    if router.reads_text:
        from molora.running_text import NAME, embedding_size

        return RouterPlace(NAME, features=embedding_size(router.embedder))
    name, layer = decoder_layer(model, router.layer, list(plan))
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return RouterPlace(name, layer, embedding.weight.shape[1])


def decoder_layer(model: nn.Module, layer: int | None, inside: list[str]) -> tuple[str, int]:
    """The name and number of decoder layer `layer`, found from the names of modules inside decoder layers; None: of the
    middle one.

    Raises:
        ValueError: there is no such layer.
    """
    stacks = {m.group(1) for name in inside if (m := re.match(r"(.*?)\d+\.", name))}
    modules = dict(model.named_modules())
    depth = sum(name.rpartition(".")[0] + "." in stacks for name in modules)
    layer = depth // 2 if layer is None else layer
    for stack in stacks:
        if f"{stack}{layer}" in modules:
            return f"{stack}{layer}", layer
    raise ValueError(f"layer={layer}: this model has decoder layers 0 to {depth - 1}; choose one of them")


def _spec(config: MoloraConfig) -> MixtureSpec:
    assert isinstance(config.router, RouterConfig)
    return MixtureSpec(
        num_experts=config.num_experts if isinstance(config.num_experts, int) else max(config.num_experts),
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        share_A=config.share_A or config.shared_basis,
        shared_basis=config.shared_basis,
        init_lora_weights=config.init_lora_weights,
        router=config.router,
        freeze_experts=config.freeze_experts,
        riemannian=config.riemannian,
    )


def _modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """(linears, FFN-shaped modules) by name, leaving out what is inside other adapters' layers and PEFT's wrappers."""
    linears: dict[str, nn.Module] = {}
    ffns: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, (MoloraLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
        if linear_features(module) is not None:
            linears[name] = module
        elif isinstance(module, MixedFFN) or looks_like_ffn(module):
            ffns[name] = module
    return linears, ffns


def _refuse_mixture_of_experts(model: nn.Module) -> None:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("experts", "shared_experts")
        and not isinstance(module, MoloraLayer)
        and (isinstance(module, nn.ModuleList) or any(p.dim() == 3 for p in module.parameters(recurse=False)))
    ]
    if found:
        name, module = found[0]
        raise ValueError(
            f"this base is itself a mixture of experts ({name}, {type(module).__name__}, and {len(found) - 1} more); "
            "molora converts dense models; use PEFT's LoraConfig with target_parameters for it"
        )


def _plan_linears(model: nn.Module, config: MoloraConfig, linears: dict[str, nn.Module], spec: MixtureSpec) -> Plan:
    names = select_modules(model, config, _targets(config), linears, "linear")
    plan: Plan = {}
    for name in names:
        own = replace(
            spec,
            r=config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), spec.r),
            lora_alpha=config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), spec.lora_alpha),
        )
        plan[name] = LinearPlan(RouterPlace(name, layer_index(name, config.layers_pattern)), own, name)
    for block, members in _blocks(names).items():
        for name in members:
            entry = plan[name]
            assert isinstance(entry, LinearPlan)
            plan[name] = entry = replace(entry, reads=block)
            if config.placement == "block":
                place = replace(entry.place, name=block)
                plan[name] = replace(entry, place=place, block=block if len(members) > 1 else None)
    return plan


def _blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups sibling linears that read the same input; the key names parent and members."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        same = next((group for group in _SAME_INPUT if leaf in group), (leaf,))
        groups.setdefault((parent, same), []).append(name)
    return {
        f"{parent}.{'+'.join(m.rpartition('.')[2] for m in members)}": members
        for (parent, _), members in groups.items()
    }


def _plan_ffns(model: nn.Module, config: MoloraConfig, ffns: dict[str, nn.Module], spec: MixtureSpec) -> Plan:
    plan: Plan = {}
    for name in select_modules(model, config, _targets(config), ffns, "FFN module"):
        module = ffns[name]
        if isinstance(module, MixedFFN):
            structure = module.structure
        else:
            try:
                structure = probe_ffn(module, getattr(model, "dtype", torch.bfloat16))
            except ValueError as error:
                raise ValueError(
                    f"placement={config.placement!r} cannot convert {name} ({type(module).__name__}): {error}; leave "
                    "it out with exclude_modules, or use placement='linear'"
                ) from None
        specs = {child: spec for _, child in structure.parts if not matches(config.exclude_modules, f"{name}.{child}")}
        if not specs:
            raise ValueError(f"exclude_modules={config.exclude_modules} leaves no projection of {name} to convert")
        place = RouterPlace(name, layer_index(name, config.layers_pattern))
        plan[name] = FFNPlan(place, structure, specs, config.placement == "ffn_linear")
    return plan


def _plan_plain_lora(
    model: nn.Module, config: MoloraConfig, linears: dict[str, nn.Module], taken: Plan, spec: MixtureSpec
) -> Plan:
    options = config.plain_lora
    assert options is not None
    plain = replace(
        spec,
        num_experts=1,
        share_A=False,
        shared_basis=False,
        r=options["r"],
        lora_alpha=options["lora_alpha"],
        router=None,
    )
    inside = tuple(f"{name}." for name, entry in taken.items() if isinstance(entry, FFNPlan)) or ("\0",)
    free = {n: m for n, m in linears.items() if n not in taken and not n.startswith(inside)}
    everything = options["target_modules"] == "all-linear" or options["target_modules"] in REGIONS
    options = {**options, "target_modules": "all-linear"} if everything else options
    names = select_modules(model, config, options, free if everything else linears, "linear", "plain_lora.")
    for name in names:
        if name not in free:
            raise ValueError(
                f"plain_lora and the mixture both want {name}; leave it out of one of them with exclude_modules"
            )
    reads = {name: block for block, members in _blocks(names).items() for name in members}
    return {name: LinearPlan(RouterPlace(name), plain, reads[name]) for name in names}


def _targets(config: MoloraConfig) -> dict[str, Any]:
    # Of a region everything that is left to choose from is wanted.
    targets = "all-linear" if config.target_modules in REGIONS else config.target_modules
    return {"target_modules": targets, "exclude_modules": config.exclude_modules}
