"""Tiny random models of the families molora converts, and a short training that leaves no parameter at its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import transformers as hf
from peft import PeftModel, get_peft_model

from molora import MoloraConfig
from molora.context import runtime_of
from molora.presets import PRESETS
from molora.routers import ROUTERS

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {k: v for k, v in _SIZES.items() if k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, sliding_window=16)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=16)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SIZES)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES)),
}
LINEAR_ONLY: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_SIZES, ffn_dim=56, word_embed_proj_dim=32)),
}
PLACEMENTS = ("linear", "block", "ffn")
CELLS = [(family, placement) for family in FAMILIES for placement in PLACEMENTS] + [("opt", "linear"), ("opt", "block")]


def base_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """A random model of the family in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return (FAMILIES | LINEAR_ONLY)[family]().to(dtype).eval()


def config(placement: str = "linear", **options: Any) -> MoloraConfig:
    """A small mixture; FFN placement with plain LoRA on what is left, so that one adapter holds all kinds."""
    options.setdefault("router", {"top_k": 2, "router_aux_loss_coef": 0.01, "init_std": 0.5})
    if placement == "ffn":
        options.setdefault("plain_lora", {"target_modules": "all-linear", "r": 3, "lora_alpha": 6})
    return MoloraConfig(**{"num_experts": 4, "r": 4, "lora_alpha": 8, "placement": placement, **options})


def batch(rows: int = 2, length: int = 11, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random tokens, the second half of the rows left-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[rows // 2 :, : length // 3] = 0
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def trained(family: str = "llama", placement: str = "linear", steps: int = 3, **options: Any) -> PeftModel:
    """A mixture after a few large steps, in eval mode: no B is zero any more."""
    model = get_peft_model(base_model(family), config(placement, **options))
    train(model, steps)
    return model.eval()


@torch.enable_grad()
def train(model: torch.nn.Module, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few steps of AdamW on one batch; the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of real tokens of the fixed batch, (N, V)."""
    inputs = batch()
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return out[inputs["attention_mask"].bool()]


# -- the presets of molora.presets, shrunk to a few numbers ------------------------------------------------------------

_SMALL: dict[str, dict[str, Any]] = {
    "mixlora": {"router": {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}},
    "mixlora-dynamic": {"router": {"router_aux_loss_coef": 0.1}},
    "mixlora-switch": {
        "router": {
            "router_aux_loss_coef": 0.1,
            "router_z_loss_coef": 0.01,
            "expert_capacity": 3,
            "router_jitter_noise": 0.0,
        }
    },
    "dynmole": {"router": {"router_aux_loss_coef": 0.1, "entropy_loss_coef": 0.05}},
    "smora": {"num_experts": 1, "r": 8, "router": {"active_ranks": 3, "bias_update_rate": 0.01}},
    "mola": {"num_experts": [2, 3, 4], "router": {"router_aux_loss_coef": 0.1}},
    "llava-mole": {"router": {"router_aux_loss_coef": 0.1}},
    "meteora": {"router": {"task_loss_coef": 1.0}},
    "adamole": {"router": {"router_aux_loss_coef": 0.1}},
    "loramoe": {"router": {"localized_balance_coef": 0.3, "localized_balance_delta": 0.2}},
    "mole": {"router": {"log_balance_coef": 0.1}},
}

# These want to know of a training batch what others do not, its prompts or its tasks: tests/test_frozen_experts.py.
PRESETS_THAT_TRAIN = [name for name in PRESETS if PRESETS[name].router not in ("retrieval", "phatgoose")]


def preset_config(name: str, **options: Any) -> MoloraConfig:
    """A published system with four experts of rank 4 for a model of three layers, no dropout, and losses that matter;
    options merge into it, inside `router` too."""
    small = {"num_experts": 4, "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **_SMALL.get(name, {}), **options}
    known = name in PRESETS and any(f.name == "init_std" for f in fields(ROUTERS[PRESETS[name].router]))
    spread = {"init_std": 0.4} if known else {}
    small["router"] = {**spread, **_SMALL.get(name, {}).get("router", {}), **options.get("router", {})}
    return MoloraConfig.from_preset(name, **small)


def preset_model(name: str, base: torch.nn.Module, seed: int = 1, **options: Any) -> PeftModel:
    """A model of a preset in training mode in which no tensor of experts or routers is at its start, unless
    init_lora_weights says so for the experts; equal arguments give equal weights."""
    torch.manual_seed(seed)
    model = get_peft_model(base, preset_config(name, **{"init_lora_weights": False, **options}))
    for site in runtime_of(model).sites:
        router: Any = site.router
        for parameter in router.parameters():
            if parameter.dim() == 1 or not parameter.any():  # biases, temperatures, gate vectors
                torch.nn.init.normal_(parameter, std=0.3)
        if hasattr(router, "set_vectors"):
            router.set_vectors(torch.randn(router.num_gates, router.vectors.shape[1]))
        if hasattr(router, "bias_steps"):
            router.bias_steps.copy_(torch.randint(-5, 6, router.bias_steps.shape))
    return model.train()
