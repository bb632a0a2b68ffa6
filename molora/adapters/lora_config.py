"""What the configuration of a PEFT LoRA must say, so that its experts compute what the adapter computed."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from molora.checks import check_bool, check_int, check_number
from molora.experts import scaling_factor

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 16 * 2**20
_MAX_ALPHA = 1e6

# Read below, or without influence on what a trained adapter computes.
_HEEDED = {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
_HEEDED |= {"exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "base_model_name_or_path"}
_HARMLESS = {"auto_mapping", "revision", "inference_mode", "peft_version", "lora_dropout", "fan_in_fan_out"}
_HARMLESS |= {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
_HARMLESS |= {"runtime_config"}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # these leave the base as it is
_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")

_WHY = {
    "bias": "trained biases have no place in an expert; train with bias='none'",
    "lora_bias": "a bias of lora_B has no place in an expert; train with lora_bias=False",
    "modules_to_save": "whole trained modules have no place in an expert; train with modules_to_save=None",
    "trainable_token_indices": "trained tokens have no place in an expert; train without them",
    "target_parameters": "experts sit on linear modules, not on parameters; train with target_modules instead",
    "layer_replication": "the base it was trained on has other layers; train on the base itself",
    "use_dora": "DoRA rescales the base's weights, which no expert can; train with use_dora=False",
    "use_qalora": "QA-LoRA pools its input, which no expert does; train with use_qalora=False",
    "alora_invocation_tokens": "an activated LoRA leaves tokens out, which no expert does; train without these tokens",
}


def short(value: Any) -> str:
    """The repr of a value on one line, cut to 120 characters."""
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 10**30 else f"a number of {value.bit_length()} bits"
    )
    return text if len(text) <= 120 else f"{text[:117]}..."


def one_line(error: BaseException) -> str:
    """What another library's exception says, on one line, cut to 200 characters."""
    text = str(error).rsplit("WeightsUnpickler error: ", 1)[-1]  # before it, torch advises to load without care
    return " ".join(f"{type(error).__name__}: {text}".split())[:200]


def refuse(path: str, sentence: str) -> ValueError:
    """The error of one adapter."""
    return ValueError(f"adapter {path}: {sentence}")


def read_config(path: str, directory: str) -> dict[str, Any]:
    """The checked adapter_config.json of a LoRA.

    Args:
        path: what messages call the adapter.
        directory: where the file is.

    Raises:
        ValueError: no such file, no JSON object, not a plain LoRA of a causal LM, or a value that makes no sense; one
            sentence with the path, what was wanted, what came and what to do.
    """
    file = os.path.join(directory, CONFIG_FILE)
    if not os.path.isfile(file):
        raise refuse(path, f"{CONFIG_FILE} is missing or no readable file; give a directory that PEFT saved")
    if os.path.getsize(file) > _MAX_BYTES:
        raise refuse(path, f"{CONFIG_FILE} has more than {_MAX_BYTES} bytes; it is damaged, save the adapter again")
    try:
        with open(file, encoding="utf-8") as text:
            config = json.load(text)
    except (ValueError, OSError, RecursionError) as error:
        raise refuse(
            path, f"{CONFIG_FILE} is not JSON ({one_line(error)}); it is damaged, save the adapter again"
        ) from None
    if not isinstance(config, dict):
        raise refuse(path, f"{CONFIG_FILE} is a {type(config).__name__}, not an object; save the adapter again")
    check_config(path, config)
    return config


def check_config(path: str, config: dict[str, Any]) -> None:
    """Raises ValueError unless the config describes a plain LoRA: y + scaling * B A x on linears of a causal LM."""
    if config.get("peft_type") != "LORA":
        raise refuse(
            path, f"peft_type={short(config.get('peft_type'))}, but only 'LORA' becomes an expert; train a LoRA"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise refuse(
            path,
            f"task_type={short(config['task_type'])}, but only adapters of causal LMs ('CAUSAL_LM' or none) become "
            "experts; its head would be lost",
        )
    defaults = LoraConfig().to_dict()
    for key, value in config.items():
        if key in _HEEDED or key in _HARMLESS or not value or _equals(value, defaults.get(key)):
            continue
        if key == "alpha" and _equals(value, config.get("lora_alpha")):
            continue  # some writers repeat lora_alpha so; PEFT ignores it
        why = _WHY.get(
            key, f"it may compute more than scaling * B A x, which is all an expert does; train without {key}"
        )
        raise refuse(path, f"{key}={short(value)} in {CONFIG_FILE}: {why}")
    _check_init(path, config.get("init_lora_weights", True))
    try:
        _check_values(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise refuse(path, f"{one_line(error).split(': ', 1)[-1]}; correct {CONFIG_FILE} or save it again") from None


def rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """The rank and scaling that PEFT gives one module: lora_alpha / r, or / sqrt(r) with use_rslora.

    Args:
        module: its full name in the base, which rank_pattern and alpha_pattern are matched against.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    return r, scaling_factor(alpha, r, bool(config.get("use_rslora")))


def _equals(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def _check_init(path: str, init: Any) -> None:
    word = init.lower() if isinstance(init, str) else init
    if isinstance(word, str) and word.startswith(_MUTATING):
        raise refuse(
            path,
            f"init_lora_weights={short(init)} changed the base it was trained on, so it does not fit the base as "
            "released; save it with path_initial_model_for_weight_conversion (PEFT has it for PiSSA, OLoRA, CorDA and "
            "LoRA-GA)",
        )
    if not any(_equals(word, known) for known in _INITS):
        raise refuse(
            path,
            f"init_lora_weights={short(init)} is not known to leave the base as it is; wanted one of "
            f"{', '.join(map(repr, _INITS))}",
        )


def _check_values(config: dict[str, Any]) -> None:
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ValueError(f"{key} is missing")
    check_int("r", config["r"])
    _check_alpha("lora_alpha", config["lora_alpha"])
    check_bool("use_rslora", config.get("use_rslora") or False)
    for key, check in (("rank_pattern", check_int), ("alpha_pattern", _check_alpha)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{key}={short(patterns)} must be an object")
        for pattern, value in patterns.items():
            _check_expression(key, pattern)
            check(f"{key}[{pattern!r}]", value)
    if not config.get("target_modules"):
        raise ValueError("target_modules is missing or empty, so nothing says which modules must have weights")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if isinstance(value, str):
            _check_expression(key, value)
        elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise ValueError(f"{key}={short(value)} must be text or a list of names")
    for pattern in config.get("layers_pattern") or ():
        _check_expression("layers_pattern", pattern)
    layers = config.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        check_int("layers_to_transform", layer, at_least=0)
    if isinstance(config["target_modules"], str) and (layers is not None or config.get("layers_pattern")):
        raise ValueError("layers_to_transform and layers_pattern need a list of target_modules, not text")
    if config.get("layers_pattern") and layers is None:
        raise ValueError("layers_pattern without layers_to_transform selects nothing")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise ValueError(f"base_model_name_or_path={short(config['base_model_name_or_path'])} must be text")


def _check_alpha(key: str, value: Any) -> None:
    if isinstance(value, (int, float)) and value > _MAX_ALPHA and value != math.inf:
        raise ValueError(f"{key}={short(value)} must be at most {_MAX_ALPHA:g}")
    check_number(key, value, above=0)


def _check_expression(key: str, pattern: str) -> None:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"{key} has {short(pattern)}, which is no regular expression ({error})") from None
