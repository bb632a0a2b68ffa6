"""Which experts produced which token of which request, and whose wishes and prompt hold for which token of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.context import runtime_of
from molora.integrations.continuous_batching import requests_of_batch, runs_eagerly, tokens_of_batch
from molora.record import Site
from molora.routers import Routing
from molora.serve.reading import PromptReader
from molora.serve.steering import Steering
from molora.steering import TokenSteering


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """The routing at the position that produced one token.

    Attributes:
        experts: (G,) their names then: experts may come and go while an answer is written.
        share: (G,) each expert's share of the gates, the mean over all routers.
        gates: (routers, G) the gates of each router.
    """

    experts: tuple[str, ...]
    share: Tensor
    gates: Tensor


class Tracer:
    """Hooks of a served model: reads routings for requests that want them, steers those that ask for it, and tells a
    router that chooses by the prompt whose tokens are whose.

    A batch holds tokens of many requests in one row; the scheduler says which are whose. Works where forwards run as
    Python (not as CUDA graphs). Costs nothing while no request asks.

    Args:
        reader: of the requests' prompts, for a router that chooses by them.
    """

    def __init__(self, model: Any, manager: Any, reader: PromptReader | None = None) -> None:
        self.manager, self.reader = manager, reader
        try:
            self.runtime: Any = runtime_of(model)
        except ValueError:
            self.runtime = None
        self._wants: dict[str, deque[TokenRouting]] = {}
        self._steered: dict[str, Steering] = {}
        self._traced: list[str] = []
        self._names: list[str] = []
        self._parts: list[Tensor] = []
        self._indices: Tensor | None = None
        base = manager.model
        self._hooks = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after),
        ]

    @property
    def available(self) -> bool:
        """Whether requests can be traced and steered."""
        return self.runtime is not None and runs_eagerly(self.manager)

    @property
    def expert_names(self) -> list[str]:
        """The names of the experts by number; their numbers where they have none; empty where gates are not experts."""
        config = getattr(self.manager.model, "peft_config", {}) if self.runtime is not None else {}
        own = next((c for c in config.values() if hasattr(c, "router")), None)
        if (
            own is None
            or not isinstance(own.num_experts, int)
            or own.router.num_gates(own.num_experts, own.r) != own.num_experts
        ):
            return []
        return list(own.expert_names or map(str, range(own.num_experts)))

    @property
    def router_names(self) -> list[str]:
        """The routers in the order of `TokenRouting.gates`; known after the first traced forward."""
        return self._names

    def begin(self, request: str, traced: bool, steering: Steering | None) -> None:
        if traced:
            self._wants[request] = deque()
        if steering is not None:
            self._steered[request] = steering

    def take(self, request: str, count: int) -> list[TokenRouting]:
        """The routings of a request's next tokens."""
        waiting = self._wants[request]
        return [waiting.popleft() for _ in range(min(count, len(waiting)))]

    def end(self, request: str) -> None:
        self._wants.pop(request, None)
        self._steered.pop(request, None)
        if self.reader is not None:
            self.reader.forget(request)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def add(self, site: Site, routing: Routing, rows: int) -> None:
        """Called by each layer of a traced forward, as any recorder."""
        self._names.append(site.name)
        assert self._indices is not None
        self._parts.append(routing.gates[self._indices].float())

    def _before(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.runtime is None or "logits_indices" not in kwargs:  # a forward that is none of the manager's
            return
        if self.reader is not None:
            vectors = self.reader.of_batch(tokens_of_batch(self.manager), kwargs["input_ids"].numel())
            self.runtime.inputs.embeddings[self.reader.router] = vectors
        if self._steered:
            self.runtime.inputs.steering = self._token_steering(kwargs["input_ids"])
        if not self._wants:
            return
        traced = [(n, name) for n, name in enumerate(requests_of_batch(self.manager)) if name in self._wants]
        if traced:
            # Kept until the forward is over: a request may leave while it runs.
            self._traced = [name for _, name in traced]
            self._indices = kwargs["logits_indices"][[n for n, _ in traced]].long()
            self._names, self._parts, self.runtime.recorder = [], [], self

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if self.runtime is None or self.runtime.recorder is not self:
            return
        self.runtime.recorder = None
        width = max(part.shape[1] for part in self._parts)
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in self._parts]
        gates = torch.stack(parts, 1)  # (tokens, routers, G)
        share = (gates / gates.sum(2, keepdim=True).clamp(min=1e-20)).mean(1)
        gates, share = gates.cpu(), share.cpu()
        experts = tuple(self.expert_names or map(str, range(width)))
        for name, own, part in zip(self._traced, gates, share, strict=True):
            waiting = self._wants.get(name)
            if waiting is not None:
                waiting.append(TokenRouting(experts, part, own))
        self._indices = None

    def _token_steering(self, input_ids: Tensor) -> TokenSteering | None:
        batch = tokens_of_batch(self.manager)
        if not any(name in self._steered for name, _ in batch):
            return None
        names, width = self.expert_names, max(site.router.num_gates for site in self.runtime.sites if site.live)
        rows = [self._steered.get(name, Steering()).rows(names, width) for name, _ in batch]
        lengths = torch.tensor([length for _, length in batch])
        keep, add = (torch.stack(part).repeat_interleave(lengths, 0) for part in zip(*rows, strict=True))
        left = input_ids.numel() - len(keep)  # padding of the batch
        keep, add = (torch.nn.functional.pad(part, (0, 0, 0, left), value=v) for part, v in ((keep, 1.0), (add, 0.0)))
        return TokenSteering(keep.to(input_ids.device), add.to(input_ids.device))
