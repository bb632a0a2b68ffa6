"""Which modules a config's names select, by PEFT's rules; a name that selects nothing is refused, with what exists."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from molora.config import REGIONS, MoloraConfig
from molora.suggest import nearest


def matches(targets: list[str] | str | None, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds endings of names."""
    if targets is None:
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def layer_index(name: str, patterns: list[str] | str | None = None) -> int | None:
    """The number of the layer a module is in: the last number in its name, or the one behind `layers_pattern`."""
    patterns = patterns or "[^.]+"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf".*(?:^|\.){pattern}\.(\d+)(?:\.|$)", name):
            return int(found.group(1))
    return None


def select_modules(
    model: nn.Module,
    config: MoloraConfig,
    options: dict[str, Any],
    modules: dict[str, nn.Module],
    what: str,
    key: str = "",
) -> list[str]:
    """The names among `modules` that the options select; refuses an option that selects nothing or is not heeded.

    Args:
        key: what stands before the options' names in messages, for instance "plain_lora.".
    """
    targets, excluded = options["target_modules"], options["exclude_modules"]
    _check_named(model, config.modules_to_save, "modules_to_save")
    _check_named(model, excluded, f"{key}exclude_modules")
    for target in targets if isinstance(targets, list) else [targets]:
        one = [target] if isinstance(targets, list) else targets
        if not any(matches(one, name) for name in modules):
            _refuse_target(model, config, one, modules, what, key)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    names = [n for n, m in modules.items() if matches(targets, n) and (targets != "all-linear" or m is not head)]
    _check_layers(names, config)
    names = [
        n
        for n in names
        if in_layers(n, config) and not matches(excluded, n) and not _saved_whole(n, config.modules_to_save)
    ]
    if not names:
        raise ValueError(
            f"{key}target_modules={targets} with {key}exclude_modules={excluded}, "
            f"modules_to_save={config.modules_to_save} and layers_to_transform={config.layers_to_transform} leaves no "
            f"{what} to convert"
        )
    return names


def in_layers(name: str, config: MoloraConfig) -> bool:
    layers = config.layers_to_transform
    wanted = [layers] if isinstance(layers, int) else layers
    return wanted is None or layer_index(name, config.layers_pattern) in wanted


def _saved_whole(name: str, modules_to_save: list[str] | None) -> bool:
    return any(f".{saved}." in f".{name}." for saved in modules_to_save or ())


def _check_named(model: nn.Module, names: list[str] | str | None, key: str) -> None:
    """Refuses a name or expression that matches no module at all: PEFT would ignore it without a word."""
    for wanted in [] if names is None else names if isinstance(names, list) else [names]:
        one = [wanted] if isinstance(names, list) else wanted
        everything = {n.replace(".base_layer", "") for n, _ in model.named_modules() if n}
        if not any(matches(one, name) for name in everything):
            hint = nearest(wanted, {name.rsplit(".", 1)[-1] for name in everything})
            raise ValueError(f"{key}={wanted!r} matches no module of this model; {hint}correct it or leave it out")


def _check_layers(names: list[str], config: MoloraConfig) -> None:
    layers = config.layers_to_transform
    have = {index for name in names if (index := layer_index(name, config.layers_pattern)) is not None}
    missing = sorted({layers} - have if isinstance(layers, int) else set(layers or ()) - have)
    if missing:
        raise ValueError(
            f"layers_to_transform={missing[0]} with layers_pattern={config.layers_pattern} is no layer of the targets; "
            f"their layers are {sorted(have)}"
        )


def _refuse_target(
    model: nn.Module, config: MoloraConfig, target: list[str] | str, modules: dict[str, nn.Module], what: str, key: str
) -> None:
    exists = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules})) or "none"
    shown = f"{key}target_modules={target if isinstance(target, str) else target[0]!r}"
    if isinstance(target, str) and any(matches([target], name) for name in modules):
        raise ValueError(
            f"{shown} as text is a regular expression for the whole name and matches no {what}; write [{target!r}] for "
            f"names that end so, or '.*{target}'"
        )
    other = next(((n, m) for n, m in model.named_modules() if n and matches(target, n)), None)
    if other is not None:
        raise ValueError(
            f"{shown} matches {other[0]} ({type(other[1]).__name__}), which is no {what}; this model's {what}s are: "
            f"{exists}"
        )
    word = target if isinstance(target, str) else target[0]
    hint = f"write {word!r} as text, not in a list; " if word in REGIONS else nearest(word, ("all-linear", *REGIONS))
    raise ValueError(f"{shown} matches no {what} of this model; {hint}its {what}s are: {exists}")
