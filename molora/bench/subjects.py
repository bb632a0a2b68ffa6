"""What is timed: Llama-shaped models with random weights, adapted by molora or by a peer."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from molora import MoloraConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Of a Llama and its batch."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    rows: int
    length: int


LLAMA_8B = Shape(4, 4096, 14336, 32, 8, 128256, 4, 2048)
"""Four layers of Llama-3-8B, 8,192 tokens."""
TINY = Shape(2, 64, 128, 4, 2, 256, 2, 16)
"""For a look at the code on a CPU; its times say nothing."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def base(shape: Shape) -> LlamaForCausalLM:
    """A random frozen Llama of that shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(4096, shape.length),
    )
    with torch.device(device()):
        model = LlamaForCausalLM(config).to(dtype())
    return model.requires_grad_(False)


def batch(shape: Shape) -> dict[str, Tensor]:
    ids = torch.randint(0, shape.vocab, (shape.rows, shape.length), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device())
    return {"input_ids": ids, "labels": ids}


def mixture(model: LlamaForCausalLM, seed: int = 2, **options: Any) -> PeftModel:
    """A mixture whose experts and routers are not at their start, in training mode."""
    torch.manual_seed(seed)
    config = MoloraConfig(**{"init_lora_weights": False, **options})
    return get_peft_model(copy.deepcopy(model), config).train()


def lora(model: LlamaForCausalLM, r: int, *, fp32: bool) -> PeftModel:
    """PEFT's LoRA on the seven linears; its default keeps the adapters in fp32."""
    torch.manual_seed(3)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEARS, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=fp32).train()


def xlora(model: LlamaForCausalLM, experts: int, r: int) -> PeftModel:
    """PEFT's X-LoRA over as many adapters; only its classifier trains, as published."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for i in range(experts):
            one = lora(model, r, fp32=False)
            one.save_pretrained(str(Path(folder) / str(i)))
            paths[str(i)] = str(Path(folder) / str(i))
            del one
        copied = copy.deepcopy(model)
        copied.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, xlora_depth=4, adapters=paths, top_k_lora=None
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(copied, config).train()


def train_step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, loss with the router losses, and the gradients of every trainable parameter."""
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(**inputs).loss, trainable, allow_unused=True)

    return step
