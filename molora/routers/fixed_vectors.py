"""Routers whose state is one vector for each expert that is set, not trained."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from molora.routers.base import Router, RouterConfig


class FixedVectorRouter(Router):
    """Base of the routers without a gradient. The vectors (E, D') are kept as int32, the bits of fp32, so that no cast
    of the model rounds them. An expert whose vector is zero is absent: it gets no gate."""

    bits: ClassVar[str]
    """Name of the buffer, as it is saved."""
    advice: ClassVar[str]
    """What a router without vectors lacks, and what to do."""

    def __init__(self, config: RouterConfig, in_features: int, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.num_gates = num_experts
        self.bias = None
        self.register_buffer(self.bits, torch.zeros(num_experts, in_features, dtype=torch.int32))
        self._is_set = False

    @property
    def vectors(self) -> Tensor:
        """(E, D') fp32."""
        found: Tensor = getattr(self, self.bits)
        return found.view(torch.float32)

    @torch.no_grad()
    def set_vectors(self, vectors: Tensor) -> None:
        """Replaces the vectors by (E, D') others, of any number of experts."""
        stored = vectors.to(getattr(self, self.bits).device, torch.float32).contiguous().view(torch.int32)
        setattr(self, self.bits, stored)
        self.num_gates = len(vectors)
        self._is_set = self.has_vectors()

    def absent(self) -> Tensor:
        """(E,) bool: the experts that are not there."""
        return ~self.vectors.any(1)

    def changes(self, expert: int, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What to copy, each second tensor into the first, so that one expert has another vector (D',): all of it at
        once, with no forward meanwhile. No tensor of the router moves."""
        stored: Tensor = getattr(self, self.bits)[expert]
        return [(stored, vector.to(stored.device, torch.float32).contiguous().view(torch.int32))]

    def has_vectors(self) -> bool:
        """Whether vectors were set."""
        return bool(getattr(self, self.bits).any())

    def check_set(self) -> None:
        """Raises ValueError where no vectors were set; one read of the device in the life of a router."""
        if not self._is_set and not torch.compiler.is_compiling():
            self._is_set = self.has_vectors()
            if not self._is_set:
                raise ValueError(self.advice)
