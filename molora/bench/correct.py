"""Correctness before speed: gradients of ours against the reference kernel's; what differs is not timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from molora.bench.subjects import device, dtype
from molora.layers import MoloraLayer
from molora.linear import MixedLinear

Step = Callable[[], tuple[Tensor | None, ...]]
"""Forward and backward of a subject; its gradients."""


def gradients(module: nn.Module, x: Tensor, dy: Tensor, model: nn.Module | None = None) -> Step:
    """Forward and backward of a module with a given upstream gradient, to the input and every trainable parameter.

    Args:
        model: the mixture that the module belongs to; None: the module itself, if it is one.
    """
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    is_mixture = any("molora_" in name for name, _ in module.named_parameters())

    def step() -> tuple[Tensor | None, ...]:
        # Without a loss of the model's own, the weight of the router losses has to be told.
        with (model or module).aux_weight(1.0) if is_mixture else nullcontext():  # type: ignore[operator]
            out = module(x)
        return torch.autograd.grad(out, wanted, dy, allow_unused=True)

    return step


def gradient_error(name: str, ours: Step, reference: Step) -> float:
    """The largest relative error of a gradient of ours against the reference kernel's.

    Raises:
        ValueError: it is above the dtype's tolerance, so that nothing wrong is timed.
    """
    error, limit = 0.0, 1e-4
    for a, b in zip(ours(), reference(), strict=True):
        if a is not None and b is not None:
            difference = (a.detach().float() - b.detach().float()).norm()
            error = max(error, float(difference / b.detach().float().norm().clamp(min=1e-12)))
            limit = 3e-2 if a.dtype == torch.bfloat16 else limit
    if not error <= limit:
        raise ValueError(f"{name}: a gradient differs from the reference kernel's by {error:.1e}; it is not timed")
    return error


def module_error(model: Any, name: str, tokens: int) -> float:
    """The largest `gradient_error` of the mixtures of the first decoder layer, each on random inputs of its own.

    One by one, because random experts make a deep model chaotic: a rounded bit moves a token to another expert, and all
    that follows.
    """
    mixtures: list[Any] = [m for n, m in model.named_modules() if isinstance(m, MoloraLayer) and ".layers.0." in n]
    errors = []
    for module in mixtures:
        width: int = module.in_features if isinstance(module, MixedLinear) else model.config.hidden_size
        x = torch.randn(1, tokens, width, device=device(), dtype=dtype(), requires_grad=True)
        dy = torch.randn_like(module(x))
        step = gradients(module, x, dy, model)
        errors.append(gradient_error(name, step, with_kernel(model, "reference", step)))
    return max(errors)


def with_kernel(model: nn.Module, kernel: str | None, step: Step) -> Step:
    """The step with that kernel."""

    def run() -> tuple[torch.Tensor | None, ...]:
        model.set_kernel(kernel)  # type: ignore[operator]
        try:
            return step()
        finally:
            model.set_kernel(None)  # type: ignore[operator]

    return run
