"""What the routers did: sums on the device for logs, and the gates of single forwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from molora.context import Runtime, runtime_of
from molora.record import Site
from molora.routers import Routing
from molora.routers.base import entropy, split_statistics
from molora.suggest import nearest

DEAD = 0.01
"""An expert is dead if its part of the gates is below this share of an equal part."""


@dataclass(frozen=True)
class RouterUse:
    """How one router used its experts over all training micro-batches since the last report.

    Attributes:
        tokens: how many counted.
        load: (G,) share of each expert in all choices; sums to one.
        mean_gate: (G,) mean gate of each expert.
        entropy_before, entropy_after: mean normalised entropy of a token's probabilities and of its gates, in [0, 1].
        top1_share: mean share of the largest gate in the sum of a token's gates.
        active: experts per token.
    """

    tokens: float
    load: list[float]
    mean_gate: list[float]
    entropy_before: float
    entropy_after: float
    top1_share: float
    active: float

    @property
    def largest_load(self) -> float:
        return max(self.load)

    @property
    def collapsed(self) -> bool:
        """Whether no more experts are alive than a single token uses, though there are more.

        A token uses at most exp(entropy of its gates) experts, rounded up: a soft router gives every expert a little.
        """
        count, alive = len(self.load), len(self.alive)
        used = min(round(self.active), math.ceil(count**self.entropy_after - 0.01))
        return alive < count and alive <= max(1, used)

    @property
    def alive(self) -> list[int]:
        """The experts that are not dead."""
        part = sum(self.mean_gate) / len(self.mean_gate)
        return [i for i, gate in enumerate(self.mean_gate) if gate > 0 and gate >= DEAD * part]

    @property
    def dead_experts(self) -> int:
        """Experts whose part of the gates is below a hundredth of an equal part."""
        return len(self.load) - len(self.alive)


def routing_report(model: nn.Module) -> dict[str, RouterUse]:
    """How each router was used since the last call, over the training micro-batches on this rank; empty without any.

    One copy from the device for all routers, at the call; training itself only adds on the device.
    """
    runtime = runtime_of(model)
    report = _uses(runtime)
    runtime.use = {}
    return {name: report[site] for site, name in _names(runtime, sorted(report)).items()}


def active_share(runtime: Runtime | None) -> float:
    """The share of its gates that a token uses, averaged over the routers, since the last `routing_report`; 1 without
    any router that ran."""
    uses = {} if runtime is None else _uses(runtime)
    return sum(use.active / len(use.load) for use in uses.values()) / len(uses) if uses else 1.0


def _uses(runtime: Runtime) -> dict[int, RouterUse]:
    if not runtime.use:
        return {}
    flat = torch.cat([value.float().cpu() for value in _by_device(runtime.use)]).double()
    report, start = {}, 0
    for site, value in _sites_by_device(runtime.use):
        row = flat[start : start + len(value)]
        start += len(value)
        if row[0] > 0:
            report[site] = _use(row)
    return report


def _names(runtime: Runtime, sites: list[int]) -> dict[int, str]:
    """The routers' names, with the adapter's in front where two adapters have one of the same name."""
    names = [runtime.sites[site].name for site in sites]
    return {
        site: name if names.count(name) == 1 else f"{runtime.sites[site].adapter}:{name}"
        for site, name in zip(sites, names, strict=True)
    }


def _sites_by_device(sums: dict[int, Tensor]) -> list[tuple[int, Tensor]]:
    return sorted(sums.items(), key=lambda item: (str(item[1].device), item[0]))


def _by_device(sums: dict[int, Tensor]) -> list[Tensor]:
    groups: dict[torch.device, list[Tensor]] = {}
    for _, value in _sites_by_device(sums):
        groups.setdefault(value.device, []).append(value)
    return [torch.cat(group) for group in groups.values()]


def _use(row: Tensor) -> RouterUse:
    tokens, rest = row[0], row[1:] / row[0]
    load, gate = rest[4:].chunk(2)
    return RouterUse(
        tokens=float(tokens),
        load=(load / load.sum().clamp(min=1e-20)).tolist(),
        mean_gate=gate.tolist(),
        entropy_before=float(rest[1]),
        entropy_after=float(rest[2]),
        top1_share=float(rest[3]),
        active=float(load.sum()),
    )


def routing_statistics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The statistics of the last training forward: for each router ``load`` (E,), its share of choices, ``mean_gate``
    (E,), ``entropy_before``, ``entropy_after``, ``top1_share``, and what its losses are made of.

    Tensors on the model's device, not synchronised. Empty before the first training forward.
    """
    runtime = runtime_of(model)
    record = runtime.last
    if record is None:
        return {}
    named = {}
    for i, stats in record.stats.items():
        site = runtime.sites[i]
        common, own = split_statistics(stats, site.router.num_gates)
        common["load"] = common["load"] / common["load"].sum().clamp(min=1e-20)
        named[site.name] = common | site.router.config.describe_own(own, site.router.num_gates)
    return named


def router_losses(model: nn.Module) -> dict[str, Tensor]:
    """For each adapter the value of its router losses (0-dim) in the last forward whose backward has run."""
    return dict(runtime_of(model).losses)


@dataclass
class RecordedRouting:
    """What one router decided in the recorded forwards.

    Attributes:
        gates: (T, G) of all forwards, one after the other, rows of a batch one after the other, padding included.
        topk_ids: (T, K) where each token has exactly K experts, else None.
        shapes: (rows, length) of each forward; T is the sum of their products.
    """

    gates: Tensor
    topk_ids: Tensor | None
    shapes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def load(self) -> Tensor:
        """(G,) share of each expert in all choices."""
        chosen = (self.gates > 0).float().sum(0)
        return chosen / chosen.sum().clamp(min=1)

    @property
    def entropy(self) -> Tensor:
        """(T,) normalised entropy of each token's gates, in [0, 1]."""
        return entropy(self.gates).squeeze(1)


class RoutingRecorder(Mapping[str, RecordedRouting]):
    """The routings of the forwards inside `record_routing`, by the name of the router's module."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor | None, tuple[int, int]]]] = {}
        self._sites: dict[str, Site] = {}

    def add(self, site: Site, routing: Routing, rows: int) -> None:
        """Keeps one routing; called by the layers. A second adapter's router of the same name bears its adapter's."""
        name = site.name
        if self._sites.setdefault(name, site) is not site:
            name = f"{site.adapter}:{name}"
        gates = routing.gates.detach()
        shape = (rows, gates.shape[0] // max(rows, 1))
        self._parts.setdefault(name, []).append((gates, routing.topk_ids, shape))

    def __getitem__(self, name: str) -> RecordedRouting:
        if name not in self._parts:
            known = ", ".join(list(self._parts)[:3]) or "nothing was recorded"
            raise KeyError(f"no router of this name ran: {name!r}; {nearest(name, self._parts)}names are as {known}")
        parts = self._parts[name]
        ids = [topk_ids for _, topk_ids, _ in parts if topk_ids is not None]
        return RecordedRouting(
            torch.cat([gates for gates, _, _ in parts]),
            torch.cat(ids) if len(ids) == len(parts) else None,
            [shape for _, _, shape in parts],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Records gates and choices of every forward inside, also of those in `generate`.

    Gives a mapping from a router's name (that of its module, or of its block) to its `RecordedRouting`. Tensors stay on
    the model's device; a recomputation by activation checkpointing is not recorded again.

    Raises:
        ValueError: the model has no mixture, or is being recorded already.
    """
    runtime: Runtime = runtime_of(model)
    if runtime.recorder is not None:
        raise ValueError("record_routing is already recording this model; leave the outer block first")
    recorder: Any = RoutingRecorder()
    runtime.recorder = recorder
    try:
        yield recorder
    finally:
        runtime.recorder = None
