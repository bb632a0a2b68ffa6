"""What modules that read the same tensor share within a forward: one routing, and one pass over that tensor."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from molora.kernels.reference import Projection
from molora.kernels.shrink import Input, shrink
from molora.routers import Routing

if TYPE_CHECKING:
    from molora.layers import MoloraLayer
    from molora.linear import MixedLinear


def write_count(x: Tensor) -> int:
    """How often `x` was written to. Inference tensors do not count that, and a compiler follows writes by itself."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


class _Decided:
    """What `SharedRouting` keeps between its members: whose tokens were routed, and how."""

    def __init__(self, key: Tensor, routing: Routing) -> None:
        self.x, self.version, self.routing, self.uses = key, write_count(key), routing, 0

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is what was routed, or an alias of it: ZeRO-3 hands each linear an alias of its own."""
        if self.x is x or torch.compiler.is_compiling():
            return self.x is x
        return (
            self.x.data_ptr() == x.data_ptr()
            and self.x.shape == x.shape
            and self.x.stride() == x.stride()
            and write_count(x) == self.version
        )


class SharedRouting:
    """The routing of modules that route by the same tensor, computed by the first and used by all of them.

    Kept only while that tensor is in use: cleared with the last member, and with each forward. Each thread has its own.
    """

    def __init__(self) -> None:
        self.owner: MoloraLayer | None = None
        self.members = 0
        self.of_thread: dict[int, _Decided] = {}

    def clear(self) -> None:
        self.of_thread.pop(_thread(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "of_thread": {}}

    def get(self, adapter: str, x: Tensor, key: Tensor, logits: Tensor | None = None) -> Routing:
        """The routing of the tokens of `x` by the tensor `key`, computed once for all members that pass the same."""
        decided = self.of_thread.get(_thread())
        if decided is None or not decided.is_of(key):
            assert self.owner is not None
            decided = self.of_thread[_thread()] = _Decided(key, self.owner.route(adapter, x, logits))
        decided.uses += 1
        if decided.uses >= self.members:
            self.clear()
        return decided.routing


class Read(NamedTuple):
    """What one linear gets of a pass over its input.

    Attributes:
        ranks: (T, C) of the linear's experts, or None where a kernel that dispatches reads the input itself.
        logits: for each layer of the group whose router reads this input (T, G).
        experts: those that the ranks are of.
    """

    ranks: Tensor | None
    logits: dict[MoloraLayer, Tensor]
    experts: Projection | None


NOTHING_READ = Read(None, {}, None)


class _Reading:
    """A pass over one tensor, in the grad mode and the region of activation checkpointing that it was begun in."""

    def __init__(self, x: Tensor, waiting: list[MixedLinear]) -> None:
        self.x, self.version, self.context = x, write_count(x), _grad_context()
        self.input = Input(x, torch.is_grad_enabled() and all(layer.base_is_plain for layer in waiting))
        self.waiting = waiting
        self.reads: dict[MixedLinear, Read] = {}

    def serves(self, layer: MixedLinear, x: Tensor) -> bool:
        known = self.x is x and self.version == write_count(x) and self.context == _grad_context()
        return known and layer in self.waiting


class SharedRead:
    """The linears of one adapter that read the same tensor; the first that is called reads for all of them.

    Each linear takes its input from `enter`, runs its frozen part on that, and then takes its `part` of the pass: a
    device that is busy with a frozen linear does not wait for the small launches beside it. What is read is kept until
    each of the linears has had its part. Linears that turn out to be called with different tensors (as in
    cross-attention) read apart from then on; replicas of them (DataParallel) always do. Each thread reads by itself.
    """

    def __init__(self) -> None:
        self.members: list[MixedLinear] = []
        self.apart = False
        self.of_thread: dict[int, _Reading] = {}

    def clear(self) -> None:
        self.of_thread.pop(_thread(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "of_thread": {}}

    def enter(self, layer: MixedLinear, adapter: str, x: Tensor) -> Tensor:
        """x (..., D) as the frozen linear must read it, so that its gradient is completed."""
        reading = self.of_thread.get(_thread())
        if reading is None or not reading.serves(layer, x):
            # A linear that has had its part begins a new pass; one that waits for its part of another tensor is apart.
            self.apart = self.apart or (reading is not None and layer in reading.waiting and reading.x is not x)
            alone = self.apart or layer not in self.members
            waiting = [layer] if alone else [m for m in self.members if m.takes_part(adapter)]
            reading = self.of_thread[_thread()] = _Reading(x, waiting)
        return reading.input.x

    def part(self, layer: MixedLinear, adapter: str) -> Read:
        """What the pass over the input that `layer` has entered gives it."""
        reading = self.of_thread[_thread()]
        if not reading.reads:
            self._read(reading, adapter)
        part = reading.reads.pop(layer)
        reading.waiting.remove(layer)
        if not reading.waiting:
            self.clear()
        return part

    def _read(self, reading: _Reading, adapter: str) -> None:
        shrinking = [m for m in reading.waiting if m.shrinks_first(adapter, reading.x)]
        experts = {m: e for m in shrinking if (e := m.experts(adapter, "")) is not None}
        routers: dict[MoloraLayer, Any] = {m: r for m in reading.waiting if (r := m.router_beside(adapter)) is not None}
        found = shrink(reading.input, [e.A for e in experts.values()], [r.product_weight for r in routers.values()])
        logits = dict(zip(routers, found.logits, strict=True))
        ranks = dict(zip(experts, found.ranks, strict=True))
        reading.reads = {m: Read(ranks.get(m), logits, experts.get(m)) for m in reading.waiting}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _grad_context() -> tuple[Any, ...]:
    """What a tensor saved now is saved for: nothing that was read under another may be used here."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # of non-reentrant checkpointing, for instance
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks
