"""LoRA directories to read and to damage, as PEFT saves them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import base_model
from torch import Tensor

from molora.adapters.lora_files import LoraPair

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def peft_model(family: str = "llama", **options: Any) -> PeftModel:
    """A model with a LoRA by PEFT that changes its outputs."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "init_lora_weights": False} | options
    if family == "gpt2":
        options["fan_in_fan_out"] = True
    base = base_model(family)
    torch.manual_seed(7)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()


def copy_lora(saved: Path, to: Path) -> Path:
    """A copy of the config and the weights, to damage."""
    to.mkdir()
    for name in (CONFIG, WEIGHTS):
        (to / name).write_bytes((saved / name).read_bytes())
    return to


def edit_config(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    file = path / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Saves the tensors that `edit` returns, or that it leaves in the dict it gets."""
    tensors = load_file(path / WEIGHTS)
    edited = edit(tensors)
    tensors = edited if isinstance(edited, dict) else tensors
    save_file({key: value.clone() for key, value in tensors.items()}, path / WEIGHTS, metadata={"format": "pt"})


def same(first: dict[str, LoraPair], second: dict[str, LoraPair]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and a.A.dtype == b.A.dtype and a.scaling == b.scaling
        for a, b in ((first[name], second[name]) for name in first)
    )


class Payload:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)
