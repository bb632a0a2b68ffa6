"""PEFT LoRA directories, read and written: of each module A (r, D), B (O, r) and the scaling of y + scaling * B A x.

Reading refuses what an expert cannot compute, and what is damaged; each refusal is one sentence. Nothing in a file is
executed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn

from molora.adapters.lora_config import (
    CONFIG_FILE,
    check_config,
    one_line,
    rank_and_scaling,
    read_config,
    refuse,
    short,
)
from molora.adapters.lora_tensors import PICKLE_FILE, SAFETENSORS_FILE, LoraPair, check_pair, parse_key, read_tensors
from molora.experts import scaling_factor


@dataclass(frozen=True)
class LoraFile:
    """One adapter.

    Attributes:
        path: what it was read from, as the caller wrote it.
        base: base_model_name_or_path of its config.
        pairs: by the full name of the module in the base model, for instance "model.layers.0.self_attn.q_proj".
        config: its adapter_config.json.
    """

    path: str
    base: str | None
    pairs: dict[str, LoraPair]
    config: dict[str, Any]


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Reads one PEFT LoRA: y + scaling * B A x on linears, in the layouts PEFT has written since 0.4.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors, or adapter_model.bin where there is no
            other; where no such directory exists, the id of a repository on the hub.

    Returns:
        The adapter. All its values were read once, to check that they are finite.

    Raises:
        ValueError: no plain LoRA, damaged, incomplete, or not found; one sentence that names the path, what was wanted,
            what came and what to do.
    """
    path = os.fspath(path)
    directory = path if os.path.isdir(path) else _download(path)
    config = read_config(path, directory)
    halves: dict[str, dict[str, Tensor]] = {}
    adapters: set[str | None] = set()
    for key, tensor in read_tensors(path, directory).items():
        module, matrix, adapter = parse_key(path, key)
        adapters.add(adapter)
        if len(adapters) > 1:
            raise refuse(
                path, f"{short(key)} belongs to another adapter than the first key; save each adapter by itself"
            )
        if matrix in halves.setdefault(module, {}):
            raise refuse(path, f"lora_{matrix} of {short(module)} is there twice; save the adapter again")
        halves[module][matrix] = tensor
    if not halves:
        raise refuse(path, "the weights file holds no lora_A and lora_B; save the adapter again")
    pairs = {}
    for module, found in halves.items():
        if len(found) == 1:
            have, lack = ("A", "B") if "A" in found else ("B", "A")
            raise refuse(
                path, f"{short(module)} has lora_{have} but no lora_{lack}; the file is damaged, save it again"
            )
        r, scaling = rank_and_scaling(config, module)
        pairs[module] = LoraPair(found["A"], found["B"], scaling)
        check_pair(path, module, pairs[module], r)
    return LoraFile(path, config.get("base_model_name_or_path"), pairs, config)


def _download(path: str) -> str:
    """The local snapshot of a hub repository's config and weights."""
    if os.path.lexists(path):
        raise refuse(path, "a file or a broken link, not a directory; give the directory that PEFT saved")
    try:
        directory = snapshot_download(path, allow_patterns=[CONFIG_FILE, SAFETENSORS_FILE])
        if not os.path.isfile(os.path.join(directory, SAFETENSORS_FILE)):
            directory = snapshot_download(path, allow_patterns=[CONFIG_FILE, PICKLE_FILE])
    except (OSError, ValueError, EntryNotFoundError) as error:  # hub errors are OSErrors, invalid ids ValueErrors
        raise refuse(
            path, f"no such directory, and no such repository on the hub ({one_line(error)}); correct the path or id"
        ) from None
    return directory


def write_lora(
    directory: str | os.PathLike[str],
    pairs: Mapping[str, LoraPair],
    base_name: str | None,
    fan_in_fan_out: bool = False,
    model: nn.Module | None = None,
) -> None:
    """Writes one LoRA as a directory that PEFT, vLLM and SGLang load: y + scaling * B A x on each module.

    `r` is the largest rank and `lora_alpha` gives the commonest scaling; modules that differ are named in rank_pattern
    and alpha_pattern. PEFT heeds both. vLLM reads neither and gives every module lora_alpha / r, so that a LoRA for it
    needs one scaling (its ranks may differ); one for SGLang needs one scaling and one rank.

    Args:
        directory: made whole or not at all; must not exist, or be empty.
        pairs: A (r, D) and B (O, r) in float32, float16 or bfloat16, of any device, by the full name of the module in
            the base model. Written in their dtype.
        base_name: base_model_name_or_path of the config.
        fan_in_fan_out: whether the modules are Conv1D (GPT-2); the shapes of A and B are the same.
        model: the base model. Where given, a last part of names ("q_proj") that no other module has stands in
            target_modules for all of them; otherwise, full names do.

    Raises:
        ValueError: no pairs, a misshaped, empty or non-finite tensor, or a directory that holds something; nothing is
            written.
    """
    directory = os.path.abspath(os.fspath(directory))
    if os.path.lexists(directory) and (not os.path.isdir(directory) or os.listdir(directory)):
        raise refuse(directory, "it is there already, and an adapter is written as a whole; choose a new directory")
    if not pairs:
        raise refuse(directory, "there are no pairs to write; give at least one module")
    for name, pair in pairs.items():
        check_pair(directory, name, pair, pair.A.shape[0] if pair.A.dim() else 0)
        if not math.isfinite(pair.scaling) or pair.scaling <= 0:
            raise refuse(directory, f"{short(name)} has scaling={pair.scaling}; give a finite number above 0")
    config = _make_config(pairs, _target_modules(pairs, model), base_name, fan_in_fan_out)
    check_config(directory, config.to_dict())
    tensors = {
        f"base_model.model.{name}.lora_{matrix}.weight": tensor.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, pair in pairs.items()
        for matrix, tensor in (("A", pair.A), ("B", pair.B))
    }
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    unfinished = f"{directory}.unfinished-{uuid.uuid4().hex}"
    os.mkdir(unfinished)
    try:
        save_file(tensors, os.path.join(unfinished, SAFETENSORS_FILE), metadata={"format": "pt"})
        config.save_pretrained(unfinished)
        os.replace(unfinished, directory)  # over an empty directory, or none
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_config(
    pairs: Mapping[str, LoraPair], targets: list[str], base_name: str | None, fan_in_fan_out: bool
) -> LoraConfig:
    """The config from whose numbers PEFT computes each pair's rank and scaling, exactly where any numbers do."""
    ranks = {name: pair.A.shape[0] for name, pair in pairs.items()}
    r = max(ranks.values())
    common = Counter(pair.scaling for pair in pairs.values()).most_common(1)[0][0]
    # lora_alpha / r reaches most scalings; those of an odd rank with use_rslora may need lora_alpha / sqrt(r).
    for use_rslora in (False, True):
        alphas = {name: _alpha(pair.scaling, ranks[name], use_rslora) for name, pair in pairs.items()}
        if all(scaling_factor(alphas[n], ranks[n], use_rslora) == pair.scaling for n, pair in pairs.items()):
            break
    else:
        use_rslora = False
        alphas = {name: _alpha(pair.scaling, ranks[name], use_rslora) for name, pair in pairs.items()}
    alpha = _alpha(common, r, use_rslora)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        rank_pattern=_pattern(ranks, r),
        alpha_pattern=_pattern(alphas, alpha),
        target_modules=targets,
        base_model_name_or_path=base_name,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.target_modules = targets  # in this order: PEFT makes a set of a list, and writes it in any order
    return config


def _alpha(scaling: float, r: int, use_rslora: bool) -> float:
    """The lora_alpha that gives a scaling: a whole number where one does."""
    near = scaling * (math.sqrt(r) if use_rslora else r)
    whole = round(near)
    candidates = (whole, near, math.nextafter(near, math.inf), math.nextafter(near, 0))
    return next((c for c in candidates if scaling_factor(c, r, use_rslora) == scaling), near)


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """rank_pattern or alpha_pattern: the names whose value is not the default."""
    pattern = {name: value for name, value in values.items() if value != default}
    # PEFT matches a pattern against endings of names, so that one name may catch another.
    if any(pattern.get(get_pattern_key(pattern.keys(), name), default) != value for name, value in values.items()):
        pattern = {f"^{re.escape(name)}": value for name, value in pattern.items()}
    return pattern


def _target_modules(pairs: Mapping[str, LoraPair], model: nn.Module | None) -> list[str]:
    names = [] if model is None else [name for name, _ in model.named_modules()]
    outside = {name.rsplit(".", 1)[-1] for name in names if name not in pairs}
    leaves = {name.rsplit(".", 1)[-1] for name in pairs}
    return sorted(pairs if model is None or leaves & outside else leaves)
