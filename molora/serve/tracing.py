"""Which experts produced which token of which request, and whose wishes and prompt hold for which token of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.adapters.places import VACANT
from molora.context import runtime_of
from molora.integrations.continuous_batching import around_forwards, requests_of_batch, tokens_of_batch
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

    A batch holds tokens of many requests in one row; the scheduler says which are whose. What is told and what is read
    lies in tensors that stay, because a forward that is replayed as a CUDA graph runs no hook: they are filled before
    it, and read behind it. Costs nothing while no request asks.

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
        self._traced: dict[str, int] = {}
        self._told: TokenSteering | None = None
        self.router_names: list[str] = []
        """The routers in the order of `TokenRouting.gates`; known after the first traced forward."""
        self._names: list[str] = []
        """Those that the forward that runs has come by."""
        self._rows: Tensor | None = None
        self._gates = torch.zeros(0, 0, 0)
        """(requests, routers, G) of the last traced forward, in the order of its new tokens."""
        self._wishes = TokenSteering(self._gates, self._gates)
        """For each token of the largest batch."""
        base = manager.model
        self._hooks = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after),
        ]
        around_forwards(manager, self._begin, self._end)

    @property
    def available(self) -> bool:
        """Whether requests can be traced and steered."""
        return self.runtime is not None

    @property
    def expert_names(self) -> list[str]:
        """The names of the experts there are; their numbers where they have none; empty where gates are not experts."""
        return [name for name in self._places if name != VACANT]

    @property
    def _places(self) -> list[str]:
        """The names by number, with those of vacant places."""
        config = getattr(self.manager.model, "peft_config", {}) if self.runtime is not None else {}
        own = next((c for c in config.values() if hasattr(c, "router")), None)
        if (
            own is None
            or not isinstance(own.num_experts, int)
            or own.router.num_gates(own.num_experts, own.r) != own.num_experts
        ):
            return []
        return list(own.expert_names or map(str, range(own.num_experts)))

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
        assert self._rows is not None
        gates = routing.gates[self._rows]
        self._gates[: len(gates), len(self._names), : gates.shape[1]] = gates
        self._names.append(site.name)

    def _begin(self) -> tuple[bool, bool]:
        """Says whose tokens the next forward has; returns whether it is steered, and whether it is traced."""
        batch = tokens_of_batch(self.manager) if self._steered else []
        steered = any(name in self._steered for name, _ in batch)
        rows = enumerate(requests_of_batch(self.manager)) if self._wants else ()
        # Kept until the forward is over: a request may leave while it runs.
        self._traced = {name: row for row, name in rows if name in self._wants}
        if steered or self._traced:
            self._fit()
        if steered:
            self._tell(batch)
        self._told = self._wishes if steered else None
        return steered, bool(self._traced)

    def _fit(self) -> None:
        """Makes what is filled and read as large as any batch, for the experts and routers there are."""
        config, device = self.manager.continuous_batching_config, self.manager.model.device
        gates = [site.router.num_gates for site in self.runtime.sites if site.live]
        shape = (config.max_requests_per_batch, len(gates), max(gates))
        if self._gates.shape != shape:
            self._gates = torch.zeros(shape, device=device)
            told = torch.zeros(config.max_batch_tokens, max(gates), device=device)
            self._wishes = TokenSteering(torch.ones_like(told), told)

    def _tell(self, batch: Sequence[tuple[str, int]]) -> None:
        """Writes down what each request of a batch wishes; behind them is padding."""
        names, width = self._places, self._gates.shape[2]
        rows = [self._steered.get(name, Steering()).rows(names, width) for name, _ in batch]
        lengths = torch.tensor([length for _, length in batch])
        for part, own, neutral in zip(self._wishes, zip(*rows, strict=True), (1.0, 0.0), strict=True):
            part.fill_(neutral)
            part[: int(lengths.sum())] = torch.stack(own).repeat_interleave(lengths, 0).to(part)

    def _before(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.runtime is None or "logits_indices" not in kwargs:  # a forward that is none of the manager's
            return
        count = kwargs["input_ids"].numel()
        if self.reader is not None:
            vectors = self.reader.of_batch(tokens_of_batch(self.manager), count)
            self.runtime.inputs.embeddings[self.reader.router] = vectors
        if self._told is not None:
            self.runtime.inputs.steering = TokenSteering(*(part[:count] for part in self._told))
        if self._traced:
            self._rows, self._names, self.runtime.recorder = kwargs["logits_indices"].long(), [], self

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if self.runtime is not None and self.runtime.recorder is self:
            self.runtime.recorder = self._rows = None
            self.router_names = self._names

    def _end(self) -> None:
        """Hands out what a traced forward has left."""
        if not self._traced:
            return
        gates = self._gates[list(self._traced.values()), : len(self.router_names)].cpu()  # (tokens, routers, G)
        names = self._places or list(map(str, range(gates.shape[2])))
        there = [number for number, name in enumerate(names) if name != VACANT]
        experts, gates = tuple(names[number] for number in there), gates[..., there]
        shares = (gates / gates.sum(2, keepdim=True).clamp(min=1e-20)).mean(1)
        for name, own, share in zip(self._traced, gates, shares, strict=True):
            waiting = self._wants.get(name)
            if waiting is not None:
                waiting.append(TokenRouting(experts, share, own))
