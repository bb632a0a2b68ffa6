"""DeepSpeed: what a ZeRO engine has spread over its processes, as one; so that another number of them can go on.

DeepSpeed's own checkpoint is a file for each process and loads into as many. It is what a run of the same size resumes
from, exactly; what stands here beside it is the same state by parameter name, small because only adapters train.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GATHERED_FILE = "gathered_state.pt"


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A model whose parameters ZeRO-3 has partitioned, whole on every process inside; any other as it is."""
    parts = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def stage3_sizes(model: nn.Module) -> dict[str, int]:
    """What stage 3 should leave whole and fetch ahead, for the words ``auto`` of a configuration.

    - ``stage3_param_persistence_threshold``: the largest trained parameter or vector. Adapters are small, and to put
      them together in every layer costs more time than their 16-bit copy memory; gradients and optimizer states are in
      parts all the same. Left out where more frozen than trained weights would stay whole with them.
    - ``stage3_prefetch_bucket_size``: what is in parts of the largest decoder layer, so that one comes while another
      computes.

    Returns:
        Numbers of elements by key, none for a model without frozen weights; parameters may be in parts already.
    """
    trained = [_numel(p) for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if not frozen:
        return {}
    vectors = [_numel(p) for p in frozen if len(getattr(p, "ds_shape", p.shape)) < 2]
    whole = max([*trained, *vectors], default=0)
    if sum(_numel(p) for p in frozen if _numel(p) <= whole) > sum(trained):
        whole = 0
    sizes = {"stage3_param_persistence_threshold": whole} if whole else {}
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    fetched = [sum(n for p in layer.parameters() if (n := _numel(p)) > whole) for layer in layers]
    if any(fetched):
        sizes["stage3_prefetch_bucket_size"] = max(fetched)
    return sizes


def fit_stage3(config: dict[str, Any], model: nn.Module) -> None:
    """Writes `stage3_sizes` over ``auto`` in a DeepSpeed configuration, before a Trainer fills in what it knows.

    A configuration of another stage stays as it is, and so does one that keeps parameters on the CPU. Raises nothing.

    Args:
        config: of DeepSpeed, changed in place; of TrainingArguments it is ``args.hf_deepspeed_config.config``.
        model: with its adapters, as the Trainer gets it.

    Source: both keys and their defaults, DeepSpeed 0.19, runtime/zero/config.py; ``auto``, Transformers'
    integrations/deepspeed.py.
    """
    zero = config.get("zero_optimization", {})
    if isinstance(zero, dict) and zero.get("stage") == 3 and "offload_param" not in zero:
        zero.update({key: size for key, size in stage3_sizes(model).items() if zero.get(key) == "auto"})


def _numel(parameter: Any) -> int:
    size: int = getattr(parameter, "ds_numel", None) or parameter.numel()
    return size


def frozen_experts(model: nn.Module) -> dict[str, Tensor]:
    """What adapters hold that nobody trains and ZeRO-3 has partitioned, whole, on the CPU; every process must call it.

    A Trainer leaves it out of what it saves of a PEFT model, because of a LoRA only the base is frozen.

    Returns:
        {full name: tensor of the parameter's shape and dtype}, empty without ZeRO-3.
    """
    parts = {n: p for n, p in model.named_parameters() if ".molora_" in n and hasattr(p, "ds_id")}
    found = {}
    for name, parameter in parts.items():
        if not parameter.requires_grad:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().cpu().clone()
    return found


def save_gathered(engine: Any, folder: Path) -> None:
    """Writes the trained parameters in fp32 and the optimizer's state of each, by name; every process has to call it.

    The file holds ``parameters`` ({name: {"fp32", "exp_avg", ...}}, of the parameter's shape), ``steps`` (numbers that
    the optimizer keeps beside them) and ``groups`` (learning rates and the like).
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = engine.optimizer.optimizer
    flat = _flat_parameters(engine.optimizer)
    state = inner.state.get(flat[0], {})
    keys = [key for key, value in state.items() if _is_elementwise(value, flat[0])]
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            full = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            found[name] = {k: v.cpu().clone() for k, v in full.items()}
            found[name]["fp32"] = safe_get_full_fp32_param(parameter).cpu().clone()
    if torch.distributed.get_rank() == 0:
        steps = {key: value for key, value in state.items() if key not in keys}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
        torch.save({"parameters": found, "steps": steps, "groups": groups}, folder / GATHERED_FILE)


@torch.no_grad()
def load_gathered(engine: Any, folder: Path) -> None:
    """Gives a fresh engine, of any number of processes and any stage, what `save_gathered` wrote.

    Raises:
        ValueError: there is no such file, or it is of other parameters.
    """
    file = folder / GATHERED_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {GATHERED_FILE}, so only as many processes as wrote it can resume from it; start as many"
        )
    saved = torch.load(file, map_location="cpu", weights_only=True)
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if trained.keys() != saved["parameters"].keys():
        other = sorted(trained.keys() ^ saved["parameters"].keys())
        raise ValueError(f"{file} is of another model: {len(other)} parameters differ, first {other[0]}")
    zero, inner = engine.optimizer, engine.optimizer.optimizer
    keys = [key for key in next(iter(saved["parameters"].values())) if key != "fp32"]
    for flat in _flat_parameters(zero):
        steps = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved["steps"].items()}
        inner.state[flat] = steps | {key: torch.zeros_like(flat) for key in keys}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in trained.items():
        for key, value in saved["parameters"][name].items():
            _set(parameter, value, key)
    for group, values in zip(inner.param_groups, saved["groups"], strict=True):
        group.update(values)


def _flat_parameters(zero: Any) -> list[Tensor]:
    """The fp32 slices of this process that the inner optimizer steps on."""
    flat: list[Tensor] = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    return flat


def _is_elementwise(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


def _set(parameter: Any, value: Tensor, key: str) -> None:
    """Writes this process's part of a whole value into the engine."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):
        # DeepSpeed's own way to set a whole value knows no padding behind the last part.
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        ranks = torch.distributed.get_world_size()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
        value = padded[rank * size : (rank + 1) * size]
        if key == "fp32":
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, key)
    elif key == "fp32":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
