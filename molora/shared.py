"""What modules that read the same tensor share within a forward: one routing, and one pass over that tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from molora.kernels.shrink import Input, shrink
from molora.routers import Routing

if TYPE_CHECKING:
    from molora.layers import MoloraLayer
    from molora.linear import MixedLinear


def write_count(x: Tensor) -> int:
    """How often `x` was written to. Inference tensors do not count that, and a compiler follows writes by itself."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


class SharedRouting:
    """The routing of modules that route by the same tensor, computed by the first and used by all of them.

    Kept only while that tensor is in use: cleared with the last member, and with each forward.
    """

    def __init__(self) -> None:
        self.owner: MoloraLayer | None = None
        self.members = 0
        self.clear()

    def clear(self) -> None:
        self.x: Tensor | None = None
        self.version = 0
        self.routing: Routing | None = None
        self.uses = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None, "routing": None, "uses": 0}

    def _same(self, x: Tensor) -> bool:
        """Whether `x` is what was routed, or an alias of it: ZeRO-3 hands each linear an alias of its own."""
        if self.x is x or self.x is None or torch.compiler.is_compiling():
            return self.x is x
        return (
            self.x.data_ptr() == x.data_ptr()
            and self.x.shape == x.shape
            and self.x.stride() == x.stride()
            and write_count(x) == self.version
        )

    def get(self, adapter: str, x: Tensor, key: Tensor, logits: Tensor | None = None) -> Routing:
        """The routing of the tokens of `x` by the tensor `key`, computed once for all members that pass the same."""
        if self.routing is None or not self._same(key):
            assert self.owner is not None
            self.routing = self.owner.route(adapter, x, logits)
            self.x, self.version, self.uses = key, write_count(key), 0
        routing = self.routing
        self.uses += 1
        if self.uses >= self.members:
            self.clear()
        return routing


class Read(NamedTuple):
    """What one linear gets of a pass over its input.

    Attributes:
        ranks: (T, C) of the linear's experts, or None where a kernel that dispatches reads the input itself.
        logits: for each layer of the group whose router reads this input (T, G).
    """

    ranks: Tensor | None
    logits: dict[MoloraLayer, Tensor]


class SharedRead:
    """The linears of one adapter that read the same tensor; the first that is called reads for all of them.

    Each linear takes its input from `enter`, runs its frozen part on that, and then takes its `part` of the pass: a
    device that is busy with a frozen linear does not wait for the small launches beside it. What is read is kept until
    each of the linears has had its part. Linears that turn out to be called with different tensors (as in
    cross-attention) read apart from then on.
    """

    def __init__(self) -> None:
        self.members: list[MixedLinear] = []
        self.apart = False
        self.clear()

    def clear(self) -> None:
        self.x: Tensor | None = None
        self.version = 0
        self.input: Input | None = None
        self.waiting: list[MixedLinear] = []
        self.reads: dict[MixedLinear, Read] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None, "input": None, "waiting": [], "reads": {}}

    def enter(self, layer: MixedLinear, adapter: str, x: Tensor) -> Tensor:
        """x (..., D) as the frozen linear must read it, so that its gradient is completed."""
        known = self.x is x and self.version == write_count(x)
        if not (known and layer in self.waiting):
            self.apart = self.apart or (bool(self.waiting) and not known)
            self.waiting = [layer] if self.apart else [m for m in self.members if m.takes_part(adapter)]
            self.x, self.version, self.reads = x, write_count(x), {}
            self.input = Input(x, all(m.base_is_plain for m in self.waiting))
        assert self.input is not None
        return self.input.x

    def part(self, layer: MixedLinear, adapter: str) -> Read:
        """What the pass over the input that `layer` has entered gives it."""
        if not self.reads:
            self._read(adapter)
        part = self.reads.pop(layer)
        self.waiting.remove(layer)
        if not self.waiting:
            self.clear()
        return part

    def _read(self, adapter: str) -> None:
        assert self.input is not None and self.x is not None
        shrinking = [m for m in self.waiting if m.shrinks_first(adapter, self.x)]
        experts = [m.experts(adapter, "") for m in shrinking]
        routed: list[MoloraLayer] = [m for m in self.waiting if m.router_beside(adapter) is not None]
        found = shrink(
            self.input,
            [e.A.flatten(0, 1) for e in experts if e is not None],
            [m.router_beside(adapter).product_weight for m in routed],
        )
        logits = dict(zip(routed, found.logits, strict=True))
        ranks = dict(zip(shrinking, found.ranks, strict=True))
        self.reads = {m: Read(ranks.get(m), logits) for m in self.waiting}
