"""Which kernel computes a mixture: a run-time choice, never saved with a checkpoint.

`MOLORA_KERNEL=reference` forces one for the whole process, `model.set_kernel("reference")` for one model.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch

from molora.kernels import dense_masked, dense_masked_ffn, fused_ffn, launch, reference

LINEAR: dict[str, ModuleType] = {"reference": reference, "dense_masked": dense_masked}
FFN: dict[str, ModuleType] = {"reference": reference, "dense_masked": dense_masked_ffn}


def _pick(kernels: dict[str, ModuleType], name: str | None) -> ModuleType:
    if torch.compiler.is_compiling():
        return reference  # the compiler fuses plain operations and writes the backward itself
    name = name or os.environ.get("MOLORA_KERNEL") or "dense_masked"
    if name not in kernels:
        raise ValueError(f"unknown kernel {name!r}; choose one of {', '.join(kernels)} (MOLORA_KERNEL or set_kernel)")
    return kernels[name]


def reads_first(kernel: str | None, x: torch.Tensor, spec: Any) -> bool:
    """Whether a linear's input is read before the frozen linear runs, by `shrink`, for all that read the same."""
    return _pick(LINEAR, kernel) is dense_masked and _triton_takes(x)


def fuses_ffn(kernel: str | None, x: torch.Tensor, num_experts: int, top_k: int, r: int) -> bool:
    """Whether the middle of an FFN mixture runs as `fused_ffn`."""
    if _pick(FFN, kernel) is not dense_masked_ffn or not _triton_takes(x):
        return False
    return r <= fused_ffn.MAX_RANK and fused_ffn.num_sets(num_experts, top_k) <= fused_ffn.MAX_SETS


def _triton_takes(x: torch.Tensor) -> bool:
    """Whether x has the dtype it is computed in, 16 bits wide, on a device with Triton, in eager mode."""
    if torch.compiler.is_compiling() or not launch.ready(x.device) or x.dtype not in (torch.bfloat16, torch.half):
        return False
    return not torch.is_autocast_enabled(x.device.type) or torch.get_autocast_dtype(x.device.type) == x.dtype


def mixture_linear(kernel: str | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Calls the chosen kernel with the arguments of `reference.mixture_linear`; None means the default."""
    return _pick(LINEAR, kernel).mixture_linear(*args, **kwargs)


def mixture_ffn(kernel: str | None, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls the chosen kernel with the arguments of `reference.mixture_ffn`; None means the default."""
    return _pick(FFN, kernel).mixture_ffn(*args, **kwargs)


def check(name: str | None) -> None:
    """Raises ValueError for a kernel that does not exist."""
    _pick(LINEAR, name)
