"""Whether Triton kernels can run on a device; where they cannot, the same mathematics runs as plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


def ready(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`. What is in the way on a GPU is logged once."""
    return device.type == "cuda" and _works(device.index)


@functools.cache
def _works(index: int | None) -> bool:
    """Compiles and runs one small kernel: a GPU that Triton does not know, or a broken install, shows here."""
    device = torch.device("cuda" if index is None else f"cuda:{index}")
    try:
        if torch.version.hip is not None:
            raise RuntimeError("nobody has run them on ROCm")
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError(f"{torch.cuda.get_device_name(device)} has no bf16 matrix units")
        from molora.kernels.ranks import gate_ranks_triton

        shrunk = torch.ones(2, 4, device=device, dtype=torch.bfloat16)
        ranks, _ = gate_ranks_triton(shrunk, 2 * torch.ones(2, 2, device=device), 4, 0.5, torch.bfloat16)
        if not bool((ranks == 1).all()):
            raise RuntimeError("a test kernel computed something else")
    except Exception as error:  # whatever a compiler or driver raises: the reason is kept, and plain PyTorch is right
        logger.warning("Triton kernels are off on %s, plain PyTorch runs instead: %s", device, error)
        return False
    return True


_NOTHING = contextlib.nullcontext()


class _AutocastOff:
    """``torch.autocast(kind, enabled=False)`` for the switch alone: a forward enters a thousand of them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off; nothing to do where it is."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return _NOTHING
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _AutocastOff(kind)


class _Unrecorded:
    """The context of a forward that no backward follows."""

    def save_for_backward(self, *tensors: object) -> None:
        pass

    mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_backward


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without autograd's price where no gradient is wanted."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_Unrecorded(), *args)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)
