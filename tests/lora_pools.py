"""LoRA adapters of tiny bases as directories, to make mixtures of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_models import base_model, batch
from torch import Tensor

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"],
}
NAMES = ("sql", "math", "code", "chat")


def write_adapter(
    path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], r: int, alpha: float, targets: list[str], **config: Any
) -> Path:
    """A PEFT directory of A (r, D) and B (O, r) by module, with nothing of ours in it."""
    LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **config).save_pretrained(path)
    tensors = {
        f"base_model.model.{name}.lora_{matrix}.weight": tensor.contiguous().clone()
        for name, pair in pairs.items()
        for matrix, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def save_lora(
    path: Path, family: str = "llama", seed: int = 0, dtype: torch.dtype | None = None, **options: Any
) -> Path:
    """A LoRA by PEFT with random A and B, saved as PEFT does."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "init_lora_weights": False} | options
    base = base_model(family)
    torch.manual_seed(100 + seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    if dtype is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(path)
    return path


def save_pool(path: Path, count: int = 3, family: str = "llama", **options: Any) -> dict[str, Path]:
    """Several of them with different alphas, by name."""
    names = [*NAMES, *(f"expert{i}" for i in range(count))][:count]
    return {
        name: save_lora(path / name, family, seed=i, **{"lora_alpha": 5 + i, **options}) for i, name in enumerate(names)
    }


def peft_lora(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> PeftModel:
    """The base with one LoRA, by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base_model(family, dtype=dtype), path).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, input_ids: Tensor | None = None) -> Tensor:
    return model(input_ids=batch()["input_ids"].clamp(min=3) if input_ids is None else input_ids).logits


def tensors_of(model: PeftModel) -> dict[str, Tensor]:
    """A copy of everything of the adapter: parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "molora_" in name}


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


def examples_of(names: Any) -> dict[str, list[str]]:
    """Example prompts of each name, of words of its own, for the word tokenizer of tests/gradients.py."""
    first = {name: 3 + 12 * i for i, name in enumerate((*NAMES, "wide", "low", "a"))}
    return {
        name: [" ".join(f"t{first[name] + (5 * j + 3 * k) % 11}" for k in range(5 + j)) for j in range(3)]
        for name in names
    }
