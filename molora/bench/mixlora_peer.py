"""The FFN block of the released `mixlora` package (0.2.3, inference only), with its parameters made trainable."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn


def available() -> bool:
    """Whether the package is installed: ``pip install --no-deps mixlora``."""
    return importlib.util.find_spec("mixlora") is not None


class MixLoraBlock(nn.Module):
    """`mixlora.model.MixLoraSparseMoe` around a frozen FFN, 8 x r16 top-2, random experts.

    In eval mode, for its dropout is not allowed to be zero.
    """

    def __init__(self, ffn: nn.Module, hidden_size: int, num_experts: int = 8, r: int = 16) -> None:
        super().__init__()
        from mixlora.config import MixLoraConfig
        from mixlora.lora_linear import LoraLinear
        from mixlora.model import MixLoraSparseMoe

        weight = next(ffn.parameters())
        config = MixLoraConfig.from_config(
            {
                "base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA", "r": r,
                "routing_strategy": "mixlora", "num_experts": num_experts, "top_k": 2, "lora_alpha": 2 * r,
                "lora_dropout": 0.05, "target_modules": ["gate_proj", "up_proj", "down_proj"], "act_fn": "silu",
            }
        )  # fmt: skip
        config.dtype_, config.model_type_ = weight.dtype, "llama"
        self.block = MixLoraSparseMoe(ffn, config)
        gate = torch.randn(num_experts, hidden_size, device=weight.device, dtype=weight.dtype) * 0.02
        self.router = nn.Parameter(gate)
        self.block.gate_ = self.router
        self.experts = nn.ModuleList()
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(ffn, name)
            for i in range(num_experts):
                A = torch.randn(r, linear.in_features, device=weight.device, dtype=weight.dtype) * 0.02
                B = torch.randn(linear.out_features, r, device=weight.device, dtype=weight.dtype) * 0.02
                expert = LoraLinear(linear, config, (A, B))
                self.block.experts_[f"experts.{i}.{name}"] = expert
                self.experts.append(expert)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name or name == "router")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out
