"""How much memory a training step holds at its most, stretch by stretch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

END = "end"
"""The stretch after the last gradient."""


def stretch_peaks(
    step: Callable[[], Any], parameters: Mapping[str, nn.Parameter], device: torch.device
) -> dict[str, int]:
    """Runs a step of forward and backward once.

    Args:
        step: gives every parameter its gradient once.
        parameters: those that are trained, by name; their ``.grad`` is there already, so that the step adds to it.
        device: where the step runs.

    Returns:
        For each stretch of the step, in their order, the most bytes that were held beyond those at its start: up to the
        moment when a parameter (its name) gets its gradient, and from the last one to the `END`.
    """
    found: dict[str, int] = {}
    meter: _Allocator | _Storages = _Allocator(device) if device.type == "cuda" else _Storages()

    def mark(name: str) -> Callable[[Tensor], None]:
        return lambda _: found.__setitem__(name, meter.peak())

    hooks = [p.register_post_accumulate_grad_hook(mark(name)) for name, p in parameters.items()]
    try:
        # The backward in this thread too, where the meter is.
        with torch.autograd.set_multithreading_enabled(False), meter:
            step()
            found[END] = meter.peak()
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Allocator:
    """What torch's CUDA allocator was asked for; what it rounds up to depends on what happens to be cached."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        torch.cuda.synchronize(self.device)
        self.before = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *error: Any) -> None: ...

    def peak(self) -> int:
        """Bytes above the start at most, since the last call."""
        found: int = torch.cuda.memory_stats(self.device)["requested_bytes.all.peak"] - self.before
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


class _Storages(TorchDispatchMode):
    """The storages that operations return and that are alive; what an operation needs inside of it is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {s._cdata for s in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given and storage not in self.alive:
                self.alive.add(storage)
                size = storage.nbytes()
                self.bytes += size
                weakref.finalize(storage, self._free, size)
        self.most = max(self.most, self.bytes)
        return out

    def _free(self, size: int) -> None:
        self.bytes -= size

    def peak(self) -> int:
        """Bytes above the start at most, since the last call."""
        found, self.most = self.most, self.bytes
        return found


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def at_length(lengths: Sequence[int], peaks: Sequence[float], length: int) -> float:
    """The peak of a stretch for lines of `length` tokens, from those for three shorter lengths of as many lines.

    It is ``a + b * length + c * length^2``: what does not depend on the tokens, activations, and attention masks or
    scores. A curvature below 2 % of the growth is rounding and counts as none.
    """
    (x0, x1, x2), (y0, y1, y2) = map(float, lengths), peaks
    slope = (y2 - y0) / (x2 - x0)
    curve = ((y2 - y1) / (x2 - x1) - (y1 - y0) / (x1 - x0)) / (x2 - x0)
    if abs(curve) * (x1 - x0) * (x2 - x1) <= 0.02 * abs(y2 - y0):
        curve = 0.0
    return y0 + (length - x0) * (slope + curve * (length - x2))
