"""Mixtures of adapters behind routers that need no training, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gradients import _tokenizer as word_tokenizer
from lora_pools import examples_of, logits_of, same_tensors, tensors_of
from peft import PeftModel
from tiny_models import base_model, batch
from torch import Tensor

from molora import from_adapters
from molora.linear import MixedLinear

KINDS: dict[str, Any] = {
    "arrow": {"name": "arrow", "top_k": 2},
    "centroid": {"name": "centroid"},
    "centroid of a layer": {"name": "centroid", "layer": 1},
    "retrieval": {"name": "retrieval", "top_k": 2},
    "fusion": {"name": "retrieval", "top_k": 2, "composition": "fusion"},
}


def make(kind: str, paths: dict[str, Path], **options: Any) -> PeftModel:
    model = from_adapters(base_model(), paths, KINDS[kind], **options).eval()
    if kind != "arrow":
        model.set_centroids(examples_of(paths), word_tokenizer())
    return model


def extra(kind: str, name: str) -> dict[str, Any]:
    """What add_expert wants to know beside the adapter."""
    return {} if kind == "arrow" else {"examples": examples_of([name])[name], "tokenizer": word_tokenizer()}


def outputs(model: PeftModel) -> Tensor:
    """Logits of two rows whose prompts are examples of the last two experts."""
    prompts = word_tokenizer()([examples_of([name])[name][0] for name in ("code", "chat")], return_tensors="pt")
    ids = torch.cat([prompts["input_ids"], batch()["input_ids"].clamp(min=3)], 1)
    with model.prompts(ids[:, :5]):
        return logits_of(model, ids)


def same_models(model: PeftModel, other: PeftModel) -> bool:
    configs = [m.peft_config["default"].to_dict() for m in (model, other)]
    for config in configs:
        for key in ("base_fingerprint", "inference_mode", "base_model_name_or_path"):  # these change with saving
            config.pop(key)
    specs = [{n: m.molora_specs for n, m in x.named_modules() if isinstance(m, MixedLinear)} for x in (model, other)]
    assert configs[0] == configs[1] and specs[0] == specs[1]
    return same_tensors(tensors_of(model), tensors_of(other)) and torch.equal(outputs(model), outputs(other))
