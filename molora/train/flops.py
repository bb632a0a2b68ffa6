"""The floating point operations that a training step needs, and what a device could do: model FLOPs utilisation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from molora.layers import linear_features

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 311.9,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}
"""Dense 16-bit matrix products with fp32 accumulation, from the makers' data sheets; the first name that occurs in the
device's name counts. Tflop/s."""
PEAK_VARIABLE = "MOLORA_PEAK_TFLOPS"


@dataclass(frozen=True)
class StepFlops:
    """What a step needs, as a function of its tokens.

    A multiplication and addition are two operations. A weight costs 2 for each token in the forward, 2 for the gradient
    of its input, and 2 for its own gradient if it is trained; so a frozen one 4 and a trained one 6. Causal attention
    costs 2 n^2 for each sequence of n tokens, layer and channel of its heads, and twice that in the backward. What
    activation checkpointing computes again is not needed, and does not count; nor do elementwise operations.

    Attributes:
        frozen: weights of all frozen linears that a token meets, the output layer included and the embedding not.
        trained: trained weights beside the experts: routers, plain LoRA, copies of modules.
        experts, frozen_experts: weights of all experts, trained or not.
        attention: layers times heads times channels of a head.
    """

    frozen: int
    trained: int
    experts: int
    frozen_experts: int
    attention: int

    def count(self, tokens: float, squares: float, active: float) -> float:
        """The operations.

        Args:
            tokens: of all sequences.
            squares: the sum over the sequences of their length squared.
            active: the share of the experts' weights that works for a token, in [0, 1].
        """
        weights = 4 * (self.frozen + active * self.frozen_experts) + 6 * (self.trained + active * self.experts)
        return weights * tokens + 6 * self.attention * squares


def step_flops(model: nn.Module) -> StepFlops:
    """Counts the weights of a causal LM with an adapter."""
    frozen = trained = 0
    experts = {True: 0, False: 0}
    for module in model.modules():
        features = None if hasattr(module, "base_layer") else linear_features(module)
        weight = getattr(module, "weight", None)
        if features is not None and isinstance(weight, nn.Parameter) and not weight.requires_grad:
            # By its sizes: a quantised or partitioned weight has another number of elements.
            frozen += features[0] * features[1]
    for name, parameter in model.named_parameters():
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        if any(f"molora_{matrix}" in name for matrix in "ABU"):
            experts[parameter.requires_grad] += size
        elif parameter.requires_grad and max(parameter.dim(), len(getattr(parameter, "ds_shape", ()))) > 1:
            trained += size
    return StepFlops(frozen, trained, experts[True], experts[False], _attention(model))


def _attention(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, hidden = getattr(config, "num_attention_heads", 0) or 0, getattr(config, "hidden_size", 0) or 0
    channels = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
    return (getattr(config, "num_hidden_layers", 0) or 0) * heads * channels


def peak_flops(device: torch.device) -> float | None:
    """What the device could do in a second; ``None`` if that is not known, as on a CPU.

    Raises:
        ValueError: the environment variable ``MOLORA_PEAK_TFLOPS``, which overrides the table, is no number above 0.
    """
    given = os.environ.get(PEAK_VARIABLE)
    if given is not None:
        try:
            peak = float(given)
        except ValueError:
            peak = 0.0
        if not 0 < peak < float("inf"):
            raise ValueError(
                f"{PEAK_VARIABLE}={given!r} must be a number above 0: what one device could do in a second, in "
                "10^12 operations; unset it to use molora's table"
            )
        return peak * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
