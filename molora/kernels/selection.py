"""Which kernel computes a mixture: a run-time choice, never saved with a checkpoint.

`MOLORA_KERNEL=reference` forces one for the whole process, `model.set_kernel("reference")` for one model.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch

from molora.kernels import dense_masked, dense_masked_ffn, launch, reference

LINEAR: dict[str, ModuleType] = {"reference": reference, "dense_masked": dense_masked}
FFN: dict[str, ModuleType] = {"reference": reference, "dense_masked": dense_masked_ffn}


def _pick(kernels: dict[str, ModuleType], name: str | None) -> ModuleType:
    if torch.compiler.is_compiling():
        return reference  # the compiler fuses plain operations and writes the backward itself
    name = name or os.environ.get("MOLORA_KERNEL") or "dense_masked"
    if name not in kernels:
        raise ValueError(f"unknown kernel {name!r}; choose one of {', '.join(kernels)} (MOLORA_KERNEL or set_kernel)")
    return kernels[name]


def reads_first(kernel: str | None, x: torch.Tensor, num_ranks: int) -> bool:
    """Whether a linear's input is read before the frozen linear runs, by `shrink`, for all that read the same."""
    if torch.compiler.is_compiling() or not launch.ready(x.device) or x.dtype not in (torch.bfloat16, torch.half):
        return False
    if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype:
        return False
    return _pick(LINEAR, kernel) is dense_masked


def mixture_linear(kernel: str | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Calls the chosen kernel with the arguments of `reference.mixture_linear`; None means the default."""
    return _pick(LINEAR, kernel).mixture_linear(*args, **kwargs)


def mixture_ffn(kernel: str | None, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls the chosen kernel with the arguments of `reference.mixture_ffn`; None means the default."""
    return _pick(FFN, kernel).mixture_ffn(*args, **kwargs)


def check(name: str | None) -> None:
    """Raises ValueError for a kernel that does not exist."""
    _pick(LINEAR, name)
