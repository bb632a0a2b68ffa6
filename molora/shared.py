"""What modules that read the same tensor share within a forward: one routing, and one pass over that tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from molora.kernels.shrink import shrink
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
        x: the input again, which the frozen linear must read: its gradient is completed there.
        ranks: (T, C) of the linear's experts.
        logits: for each layer of the group whose router reads this input (T, G).
    """

    x: Tensor
    ranks: Tensor
    logits: dict[MixedLinear, Tensor]


class SharedRead:
    """The linears of one adapter that read the same tensor; the first that is called reads for all of them.

    What is read is kept until each of them has had its part. Linears that turn out to be called with different tensors
    (as in cross-attention) read apart from then on.
    """

    def __init__(self) -> None:
        self.members: list[MixedLinear] = []
        self.apart = False
        self.clear()

    def clear(self) -> None:
        self.x: Tensor | None = None
        self.version = 0
        self.reads: dict[MixedLinear, Read] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None, "reads": {}}

    def get(self, layer: MixedLinear, adapter: str, x: Tensor) -> Read:
        """The part of `layer` in a pass over x (..., D)."""
        known = self.x is x and self.version == write_count(x)
        if not (known and layer in self.reads):
            self.apart = self.apart or (bool(self.reads) and not known)
            members = [layer] if self.apart else [m for m in self.members if m.takes_part(adapter)]
            self.x, self.version, self.reads = x, write_count(x), self._read(members, adapter, x)
        part = self.reads.pop(layer)
        if not self.reads:
            self.clear()
        return part

    @staticmethod
    def _read(members: list[MixedLinear], adapter: str, x: Tensor) -> dict[MixedLinear, Read]:
        experts = [m.experts(adapter, "") for m in members]
        routed = [m for m in members if m.router_beside(adapter) is not None]
        found = shrink(
            x,
            [e.A.flatten(0, 1) for e in experts if e is not None],
            [m.molora_router[adapter].weight for m in routed],
            adds_in_place=all(m.base_is_plain for m in members),
        )
        logits = dict(zip(routed, found.logits, strict=True))
        return {m: Read(found.x, ranks, logits) for m, ranks in zip(members, found.ranks, strict=True)}
