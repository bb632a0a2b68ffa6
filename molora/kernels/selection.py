"""Which kernel computes a mixture: a run-time choice, never saved with a checkpoint.

`MOLORA_KERNEL=reference` forces one for the whole process, `model.set_kernel("reference")` for one model; else a cost
model chooses between the dense-masked and the grouped kernel. `molora bench --explain` shows the choices.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molora.kernels import cost, dense_masked, dense_masked_ffn, fused_ffn, launch, reference
from molora.kernels.reference import Projection

logger = logging.getLogger(__name__)

DISPATCH = ("grouped", "torch_grouped_mm", "megablocks")
"""Kernels that send tokens to experts: they need the K chosen experts of each token."""
KERNELS = ("reference", "dense_masked", *DISPATCH)


class Shape(NamedTuple):
    """Of a mixture of a linear, as far as a choice depends on it.

    Attributes:
        tokens: T.
        in_features, out_features: D, O.
        num_experts, r: E, R.
        top_k: K, the experts of a token; None where that varies, or where ranks are gated one by one.
        shares_A: whether all experts have one A.
        dtype: compute dtype.
        device: where it runs.
    """

    tokens: int
    in_features: int
    out_features: int
    num_experts: int
    r: int
    top_k: int | None
    shares_A: bool
    dtype: torch.dtype
    device: torch.device


class Choice(NamedTuple):
    """A kernel and, in a few words, why."""

    kernel: str
    reason: str


def requested(kernel: str | None) -> str | None:
    """The kernel that was asked for by `set_kernel` or by the environment, if one was.

    Raises:
        ValueError: there is no kernel of this name.
    """
    name = kernel or os.environ.get("MOLORA_KERNEL") or None
    if name is not None and name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; choose one of {', '.join(KERNELS)} (MOLORA_KERNEL or set_kernel)")
    return name


def choose(kernel: str | None, shape: Shape) -> Choice:
    """The kernel of a mixture of a linear.

    Raises:
        ValueError: the kernel that was asked for does not exist, or cannot run here; with the reason.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses plain operations and writes the backward itself.
        return Choice("reference", "compiled")
    bucket = 1 << max(0, shape.tokens - 1).bit_length()  # one choice for lengths that differ a little
    return _choose(requested(kernel), shape._replace(tokens=bucket))


@functools.lru_cache(maxsize=4096)
def _choose(name: str | None, shape: Shape) -> Choice:
    if name in DISPATCH:
        reason = _cannot_dispatch(shape)
        if reason is not None:
            logger.warning("kernel %s cannot compute a mixture %s; dense_masked does", name, reason)
            return Choice("dense_masked", f"{name} cannot compute a mixture {reason}")
        reason = why_not(name, shape)
        if reason is not None:
            raise ValueError(f"kernel {name!r} cannot run here: {reason}")
    if name is not None:
        return Choice(name, "asked for")
    choice = _cheapest(shape)
    logger.info("kernel %s for %s: %s", choice.kernel, tuple(shape[:6]), choice.reason)
    return choice


def _cannot_dispatch(shape: Shape) -> str | None:
    if shape.shares_A:
        return "whose experts share A"
    return "whose tokens have no fixed number of experts" if shape.top_k is None else None


def _cheapest(shape: Shape) -> Choice:
    if _cannot_dispatch(shape) is not None or shape.top_k == shape.num_experts:
        return Choice("dense_masked", "nothing to dispatch")
    if not launch.ready(shape.device) or shape.dtype not in (torch.bfloat16, torch.half):
        return Choice("dense_masked", "grouped kernels need Triton and 16-bit compute")
    dense, grouped = predicted(shape)
    # Linears that read the same input share dense-masked passes over it, which the model does not count.
    better = "grouped" if grouped < 0.85 * dense else "dense_masked"
    return Choice(better, f"predicted {1e3 * dense:.2f} ms dense_masked, {1e3 * grouped:.2f} ms grouped")


def predicted(shape: Shape) -> tuple[float, float]:
    """Seconds of forward and backward beside the frozen linear, by the dense-masked and by the grouped kernel."""
    assert shape.top_k is not None
    rates, size = cost.device_rates(shape.device), shape.dtype.itemsize
    T, D, O, E, R, _ = shape[:6]
    return cost.dense_seconds(rates, T, D, O, E, R, size), cost.grouped_seconds(rates, T, D, O, E, R, shape.top_k, size)


def why_not(name: str, shape: Shape) -> str | None:
    """Why a kernel cannot run on this device in this dtype, or None."""
    if name == "grouped":
        if not launch.ready(shape.device):
            return f"Triton does not run on {shape.device}"
        return None if shape.dtype != torch.float64 else "it has no fp64"
    if name in DISPATCH:
        sizes = (shape.num_experts, shape.r, shape.in_features, shape.out_features)
        reason: str | None = _module(name).why_not(shape.device, shape.dtype, sizes)
        return reason
    return None


def _module(name: str) -> ModuleType:
    """The kernel's module; those that need Triton or a foreign package are imported when they are first used."""
    if name == "grouped":
        from molora.kernels import grouped

        return grouped
    if name == "torch_grouped_mm":
        from molora.kernels import torch_grouped_mm

        return torch_grouped_mm
    if name == "megablocks":
        from molora.kernels import megablocks_adapter

        return megablocks_adapter
    return {"reference": reference, "dense_masked": dense_masked}[name]


def reads_first(x: Tensor) -> bool:
    """Whether an input is read before the frozen linear runs, by `shrink`, for all that read the same: x has the dtype
    it is computed in, 16 bits wide, on a device with Triton, in eager mode."""
    if torch.compiler.is_compiling() or not launch.ready(x.device) or x.dtype not in (torch.bfloat16, torch.half):
        return False
    return not torch.is_autocast_enabled(x.device.type) or torch.get_autocast_dtype(x.device.type) == x.dtype


def fuses_ffn(kernel: str | None, x: Tensor, num_experts: int, top_k: int, r: int) -> bool:
    """Whether the middle of an FFN mixture runs as `fused_ffn`."""
    if requested(kernel) == "reference" or not reads_first(x):
        return False
    return fused_ffn.fits(x.device, num_experts, top_k, r)


def mixture_linear(
    kernel: str | None,
    x: Tensor,
    gates: Tensor | None,
    experts: Projection,
    out: Tensor,
    *,
    topk_ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`reference.mixture_linear` by the kernel that `choose` names; None means no kernel was asked for."""
    by_expert = gates is not None and topk_ids is not None and gates.shape[1] == experts.num_experts
    shape = Shape(
        x.shape[:-1].numel(),
        x.shape[-1],
        out.shape[-1],
        experts.num_experts,
        experts.B.shape[1],
        topk_ids.shape[1] if by_expert and topk_ids is not None else None,
        experts.shares_A,
        out.dtype,
        out.device,
    )
    chosen = _module(choose(kernel, shape).kernel)
    result: Tensor = chosen.mixture_linear(x, gates, experts, out, topk_ids=topk_ids, **options)
    return result


def mixture_ffn(kernel: str | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`reference.mixture_ffn` by the reference, if that was asked for or is compiled, else slot-masked."""
    plain = torch.compiler.is_compiling() or requested(kernel) == "reference"
    return (reference if plain else dense_masked_ffn).mixture_ffn(*args, **kwargs)


def check(name: str | None) -> None:
    """Raises ValueError for a kernel that does not exist."""
    requested(name)
