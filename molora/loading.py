"""Loud loading: what a checkpoint must hold, and which base it belongs to."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from molora.context import Runtime
from molora.layers import MoloraLayer

_SAMPLES = 16


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by their name in the model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoloraLayer):
            for container in module.adapter_layer_names:
                entries = getattr(module, container)
                if adapter in entries:
                    for key, value in entries[adapter].state_dict(keep_vars=True).items():
                        found[f"{name}.{container}.{adapter}.{key}"] = value
    return found


def check_state_dict(model: nn.Module, config: PeftConfig, adapter: str, state_dict: dict[str, Tensor]) -> None:
    """Compares what a checkpoint holds with what the model expects, before anything is loaded.

    Raises:
        ValueError: a missing, extra, misshaped or non-finite tensor, or another base; named, and nothing is loaded.
    """
    check_base(model, config)
    expected = adapter_parameters(model, adapter)
    # PEFT saves full copies of modules, trained tokens, biases and embeddings beside the adapter's own tensors: all of
    # them have a place in the model, with or without the prefix of a PeftModel.
    beside = tuple(name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    places = model.state_dict().keys()
    others = {
        n
        for n in state_dict
        if n not in places
        and n.removeprefix("base_model.model.") not in places
        and not (beside and n.startswith(beside))
    }
    missing = [name for name in expected if name not in state_dict]
    if missing:
        raise ValueError(
            f"the checkpoint of adapter {adapter!r} lacks {len(missing)} of {len(expected)} tensors, first "
            f"{missing[0]}; it is damaged, or was saved from another configuration"
        )
    if others:
        raise ValueError(
            f"the checkpoint of adapter {adapter!r} has {len(others)} tensors that this base with this config has no "
            f"place for, first {sorted(others)[0]}; it belongs to another base or configuration"
        )
    for name, parameter in expected.items():
        value, want = state_dict[name], tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(value.shape) != want:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint and {want} in the model; it belongs to "
                "another base or configuration"
            )
        if value.is_floating_point() != parameter.is_floating_point():
            raise ValueError(
                f"{name} is {value.dtype} in the checkpoint and {parameter.dtype} in the model; it is damaged"
            )
        bits = value.view(torch.float32) if name.endswith("_bits") and not value.is_meta else value
        if not value.is_meta and not bool(bits.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity in the checkpoint; it is damaged, or its training diverged")
    runtime = next(
        (m.molora_runtime for m in model.modules() if isinstance(m.__dict__.get("molora_runtime"), Runtime)), None
    )
    if isinstance(runtime, Runtime):
        runtime.unverified.discard(adapter)


@torch.no_grad()
def verify_loaded(model: nn.Module, runtime: Runtime) -> None:
    """Checks at the first forward an adapter that transformers' own `load_adapter` has filled, which calls no code of
    ours.

    That route refuses misshaped tensors and lists extra ones itself; what it only lists, a missing tensor, is an error
    here, as are non-finite values and another base.
    """
    for adapter in sorted(runtime.unverified):
        config = getattr(model, "peft_config", {}).get(adapter)
        if config is not None:
            check_base(model, config)
        tensors = adapter_parameters(model, adapter)
        loaded = [name for name, t in tensors.items() if getattr(t, "_is_hf_initialized", False)]
        missing = [name for name in tensors if name not in set(loaded)]
        if loaded and missing:
            raise ValueError(
                f"the checkpoint of adapter {adapter!r} lacks {len(missing)} of {len(tensors)} tensors, first "
                f"{missing[0]}; it is damaged, or was saved from another configuration"
            )
        for name, tensor in tensors.items():
            if not tensor.is_meta and not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged, or its training diverged")
    runtime.unverified.clear()


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base from another: its sizes, and a few numbers of its input embedding (empty where those are not
    at hand: sharded by FSDP, offloaded, of ZeRO-3 in any process but the first, which has the first rows)."""
    config = getattr(model, "config", None)
    config = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    keys = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer")
    return {**{k: config[k] for k in keys if k in config}, "embedding": _embedding_sample(model)}


def _embedding_sample(model: nn.Module) -> list[float]:
    get = getattr(model, "get_input_embeddings", None)
    try:
        module = get() if get is not None else None
    except NotImplementedError:
        return []
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    module = getattr(module, "base_layer", module)
    weight: Any = getattr(module, "weight", None)
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return []
    shape = getattr(weight, "ds_shape", weight.shape)
    if len(shape) != 2:
        return []
    rows, columns = min(shape[0], 64), shape[1]
    flat = _first_part(weight) if hasattr(weight, "ds_id") else weight.detach().reshape(-1)
    if flat.numel() < rows * columns:
        return []
    values = flat[[i * 7 % rows * columns + i * 13 % columns for i in range(_SAMPLES)]].float().cpu()
    return [round(v, 6) for v in values.tolist()]


def _first_part(weight: Any) -> Tensor:
    """Of a parameter that ZeRO-3 has partitioned, what the first process holds: its first elements."""
    part: Tensor = weight.ds_tensor.detach()
    return part if torch.distributed.get_rank() == 0 else part[:0]


def check_base(model: nn.Module, config: PeftConfig) -> None:
    """Refuses an adapter of another base. Tolerates another dtype of the same base.

    Raises:
        ValueError: sizes or embedding differ from those recorded when the adapter was saved.
    """
    saved = getattr(config, "base_fingerprint", None)
    if not saved:
        return
    here = base_fingerprint(model)
    differs = [k for k in saved if k != "embedding" and saved[k] != here.get(k)]
    ours, theirs = here["embedding"], saved.get("embedding") or []
    scale = max(map(abs, itertools.chain(theirs, [0.0])))
    if not differs and ours and theirs and any(abs(a - b) > 2e-2 * scale for a, b in zip(ours, theirs, strict=False)):
        differs = ["embedding"]
    if differs:
        what = ", ".join(f"{k} {saved[k]} there, {here.get(k)} here" for k in differs if k != "embedding")
        raise ValueError(
            f"this adapter was trained on another base ({config.base_model_name_or_path or 'unnamed'}: "
            f"{what or 'its input embedding has other values'}); load that base, or set base_fingerprint=None in the "
            "loaded config to use it here on purpose"
        )
