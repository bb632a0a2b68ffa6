"""Tiny random models of the families molora converts, and a short training that leaves no parameter at its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from peft import PeftModel, get_peft_model

from molora import MoloraConfig

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
