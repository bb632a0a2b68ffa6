"""Bases whose linears bitsandbytes has quantised: how they are asked for, and what may be done to their output."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

QUANTIZATIONS = ("nf4", "nf4_double", "int8")
"""NF4 in blocks of 64 (QLoRA, arXiv 2305.14314), the same with its scales in 8 bits, LLM.int8 (arXiv 2208.07339)."""


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes as ``quantization_config``.

    Args:
        name: one of `QUANTIZATIONS`.
        dtype: that of the model; a 4-bit linear computes in it, so that nothing is cast on the way in and out.

    Raises:
        ValueError: another name, or bitsandbytes is not installed.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization={name!r} must be one of {', '.join(QUANTIZATIONS)}, or left out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization={name!r} needs bitsandbytes, which is not installed; run pip install 'molora[quantization]'"
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=name == "nf4_double",
    )


def is_linear_4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear and no subclass of it.

    Its output is a fresh tensor that its backward does not read, and so is the gradient of its input, as for
    `nn.Linear`. That of the 8-bit linear is a view made inside an autograd Function, which may not be added into.
    """
    bitsandbytes: Any = sys.modules.get("bitsandbytes")  # a module of its type is there only if it is imported
    return bitsandbytes is not None and type(module) is bitsandbytes.nn.Linear4bit


def num_weights(parameter: nn.Parameter) -> int:
    """The numbers that a parameter stands for: a 4-bit one holds two in a byte, one that ZeRO-3 partitioned none."""
    state = getattr(parameter, "quant_state", None)
    whole: int = getattr(parameter, "ds_numel", parameter.numel())
    return whole if state is None else int(torch.Size(state.shape).numel())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once, and of the scales of quantised ones."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        tensors += [] if state is None else state.as_dict(packed=True).values()
        scales = getattr(getattr(module, "state", None), "SCB", None)  # of an 8-bit linear that has run
        tensors += [] if scales is None else [scales]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def is_quantized(model: nn.Module) -> bool:
    """Whether linears of the model hold integers."""
    return any(isinstance(module, nn.Linear) and not module.weight.is_floating_point() for module in model.modules())


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """Keeps 4-bit linears from repacking their weights at the first forward without gradients.

    On CPUs with AVX512-BF16 bitsandbytes does that for speed, and the repacked weights let no gradient through: what is
    scored before it is trained would then train its last layers only, without a word.
    """
    for module in model.modules():
        if is_linear_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
