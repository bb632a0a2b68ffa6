"""The fair baseline of a mixture: one LoRA with as many parameters on the same linears."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from fractions import Fraction
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from molora.checks import check_choice
from molora.config import MoloraConfig
from molora.layers import MixtureSpec, MoloraLayer, linear_features
from molora.plan import FFNPlan, LinearPlan, plan_conversion
from molora.suggest import unknown_key_message


def equal_lora(base: nn.Module, config: MoloraConfig, count: str = "trainable", **options: Any) -> LoraConfig:
    """A LoRA on the linears that a mixture converts, with its number of parameters or just above.

    The rank is the smallest with ``r * sum(in + out) >= parameters of the mixture``, routers and plain LoRA included.
    What the mixture trains beside that (modules_to_save, biases, token embeddings) the LoRA trains too. Nothing is
    converted: the base stays as it is.

    Args:
        base: the model that would be converted.
        config: of the mixture.
        count: "trainable", all parameters of the mixture, frozen experts too, or "active", those that work for one
            token: its routers, and of its experts the chosen ones.
        options: more keys of LoraConfig, other than r and target_modules; lora_alpha is 2r and the dropout the
            mixture's where they say nothing.

    Returns:
        A causal-LM LoraConfig, its targets by their full names.

    Raises:
        ValueError: `config` cannot convert `base`, an option that is not the caller's, or count="active" for a router
            whose number of chosen experts varies from token to token.
    """
    check_choice("count", count, ("trainable", "active"))
    if not isinstance(config, MoloraConfig):
        raise ValueError(f"config must be the MoloraConfig of a mixture, got {config!r}")
    for key in options:
        if key in ("r", "target_modules"):
            raise ValueError(f"{key} follows from the mixture; remove it, or write the LoraConfig yourself")
        if key not in (known := [field.name for field in fields(LoraConfig) if field.init]):
            raise ValueError(unknown_key_message("LoraConfig", key, known))
    modules = dict(base.named_modules())
    targets: dict[str, int] = {}
    parameters = Fraction(0)
    blocks = set()
    for name, entry in plan_conversion(base, copy.deepcopy(config)).items():
        if isinstance(entry, FFNPlan):
            specs = {f"{name}.{child}": spec for child, spec in entry.specs.items()}
        else:
            specs = {name: entry.spec}
        for linear, spec in specs.items():
            inputs, outputs = linear_features(modules[linear]) or (0, 0)
            targets[linear] = inputs + outputs
            share = Fraction(1) if count == "trainable" else _active_share(spec)
            own = spec.r if spec.shared_basis else outputs
            experts = spec.num_experts * spec.r * (own + (0 if spec.share_A else inputs))
            shared = (inputs if spec.share_A else 0) + (outputs if spec.shared_basis else 0)
            parameters += share * experts + spec.r * shared
        spec = next(iter(specs.values()))
        if spec.router is None or entry.block in blocks:
            continue
        blocks |= {entry.block} - {None}
        with torch.device("meta"):
            features = entry.place.features or _input_size(modules, name, entry)
            router = spec.router.build(features, spec.num_experts, spec.r)
        parameters += sum(weight.numel() for weight in router.parameters())
    rank = math.ceil(parameters / sum(targets.values()))
    defaults = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": 2 * rank,
        "lora_dropout": config.lora_dropout,
        "bias": "lora_only" if config.bias == "molora_only" else config.bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
    }
    return LoraConfig(**defaults | options, r=rank, target_modules=sorted(targets))


def active_parameters(model: nn.Module, adapter: str = "default") -> int | None:
    """Of a mixture's parameters those that work for one token: its routers, and of its experts the chosen ones; None
    where their number varies from token to token, or there is no mixture."""
    layers = [m for m in model.modules() if isinstance(m, MoloraLayer) and adapter in m.molora_specs]
    found = Fraction(0)
    for layer in layers:
        containers = [layer.molora_U, layer.molora_router]
        for part, spec in layer.molora_specs[adapter].items():
            try:
                share = _active_share(spec)
            except ValueError:
                return None
            A, B = (getattr(layer, f"molora_{matrix}{part}")[adapter].weight.numel() for matrix in "AB")
            found += share * B + (1 if spec.share_A else share) * A
        found += sum(p.numel() for c in containers if adapter in c for p in c[adapter].parameters())
    return round(found) if layers else None


def _input_size(modules: dict[str, nn.Module], name: str, entry: LinearPlan | FFNPlan) -> int:
    """The size of what a router reads: the input of its linear, or of its FFN."""
    if isinstance(entry, FFNPlan):
        name = f"{name}.{next(child for part, child in entry.structure.parts if part != 'down')}"
    features = linear_features(modules[name])
    assert features is not None
    return features[0]


def _active_share(spec: MixtureSpec) -> Fraction:
    """The share of an adapter's ranks that work for one token."""
    if spec.router is None:
        return Fraction(1)
    chosen = spec.router.num_chosen(spec.num_experts, spec.r)
    if chosen is None:
        raise ValueError(
            f"count='active': how many experts router {spec.router.name!r} chooses varies from token to token; compare "
            "at count='trainable'"
        )
    return Fraction(chosen, spec.router.num_gates(spec.num_experts, spec.r))
