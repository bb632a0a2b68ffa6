"""One forward of the base model: what its routers were told, what they decided, and the losses made of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from molora.routers import Router, SiteStats
from molora.routers.base import common_size, split_statistics
from molora.steering import TokenSteering
from molora.window import Window


@dataclass(frozen=True)
class Site:
    """One router in the model.

    Attributes:
        layer: number of its decoder layer, None where its name has none.
        owner: the `MoloraLayer` that holds it; None once its adapter was deleted.
    """

    name: str
    adapter: str
    router: Router
    layer: int | None = None
    owner: Any = None

    @property
    def live(self) -> bool:
        """Whether the next forward asks it."""
        owner = self.owner
        return owner is not None and not owner._disable_adapters and self.adapter in owner.active_adapters


@dataclass(eq=False)
class ForwardInputs:
    """What routers are told of a forward's tokens, beside their hidden states.

    Attributes:
        rows: sequences in the batch, where the model's input says so.
        token_mask: (T,) bool, or None: every token counts.
        task_labels: (B,) or (B, T) integers, the task of each row or token, or None.
        sequence: (T,) int64, the number of each token's sequence where position ids say that lines hold several.
        embeddings: for a router that reads something else than its module's input, by the router's name: (N, D).
        steering: what a server does to the gates of its requests' tokens, or None.
    """

    rows: int | None = None
    token_mask: Tensor | None = None
    task_labels: Tensor | None = None
    sequence: Tensor | None = None
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    steering: TokenSteering | None = None


@dataclass(eq=False)
class ForwardRecord:
    """One forward of the base model, until its backward.

    Attributes:
        number: counts forwards; the ticket that operators carry.
        inputs: what its routers were told; a recomputation is told the same.
        explicit: whether the base model's hooks opened it; a compiled forward opens its own at the first statistics.
        stats: for each site the (S,) statistics, detached.
        counted: whether its choices were added to the window and to the telemetry.
        weights: what each observed output adds to the weight the trainer gives this forward's mean LM loss, 0-dim; None
            where the loss is no multiple of it. Filled as a backward begins, anew in each.
        backward: the backward that filled `weights`.
        given_weight: the weight set by `aux_weight`, which then holds.
        grads: for each site the gradient of the losses; made at the first backward, when all layers have recorded.
        weighted: `grads` times the weight, once that is known.
        losses: for each adapter the value of its router losses, 0-dim.
    """

    number: int
    inputs: ForwardInputs = field(default_factory=ForwardInputs)
    explicit: bool = True
    stats: dict[int, Tensor] = field(default_factory=dict)
    counted: bool = False
    weights: list[Tensor | None] = field(default_factory=list)
    backward: int = -1
    given_weight: float | None = None
    grads: dict[int, Tensor] | None = None
    weighted: dict[int, Tensor] | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread: a forward in there is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def token_mask(attention_mask: Any) -> Tensor | None:
    """Which tokens count, from an attention mask as transformers has them.

    Args:
        attention_mask: None, (B, T) with 0 for padding, (B, 1, T, T) bool or additive, or a dict of those (Gemma-3).

    Returns:
        (B*T,) bool. In a 4-D mask a token counts if it may attend to itself. None if every token counts.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((m for m in attention_mask.values() if m is not None), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 4:
        queries, keys = attention_mask.shape[-2:]
        diagonal = attention_mask[:, 0].diagonal(keys - queries, -2, -1)
        return (diagonal if diagonal.dtype == torch.bool else diagonal == 0).flatten()
    return attention_mask.bool().flatten() if attention_mask.dim() == 2 else None


def packed_sequences(position_ids: Any, attention_mask: Any, rows: int | None) -> Tensor | None:
    """The number of each token's sequence, by the rule of transformers: without an attention mask, a position that does
    not follow the one before it begins a sequence.

    Args:
        position_ids: (B, T), or (1, T) for all lines alike; anything else says nothing.
        rows: B.

    Returns:
        (B*T,) int64, rising by ones from 0; None where nothing says that lines hold several sequences.
    """
    if attention_mask is not None or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return None
    position_ids = position_ids.expand(rows or -1, -1)
    follows = position_ids.diff(prepend=position_ids[:, :1]) == 1
    return (~follows).flatten().cumsum(0) - 1


def _alike(stats: Mapping[int, Tensor], sites: Sequence[Site]) -> list[tuple[list[int], Tensor]]:
    """The statistics (n, S) of n routers each, in groups of one shape: a few operations for hundreds of routers."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for site, values in stats.items():
        groups.setdefault((sites[site].router.num_gates, values.shape, values.device), []).append(site)
    return [(numbers, torch.stack([stats[n] for n in numbers])) for numbers in groups.values()]


@torch.no_grad()
def count_choices(stats: Mapping[int, Tensor], sites: Sequence[Site], window: Window, use: dict[int, Tensor]) -> None:
    """Adds the choices of a forward to the window, and to the sums of the telemetry.

    Args:
        use: for each router ``[tokens, tokens * each other common statistic]``.
    """
    for numbers, values in _alike(stats, sites):
        num_gates = sites[numbers[0]].router.num_gates
        common = values[:, : common_size(num_gates)].float()
        moving = [i for i, n in enumerate(numbers) if sites[n].router.config.moves_at_step]
        if moving:
            loads = torch.stack([split_statistics(values[i], num_gates)[0]["load"] for i in moving])
            window.count([numbers[i] for i in moving], common[moving, 0], loads)
        sums = torch.cat([common[:, :1], common[:, 1:] * common[:, :1]], 1)
        if all(n in use for n in numbers):
            sums = sums + torch.stack([use[n] for n in numbers])
        else:
            sums = torch.stack([row + use[n] if n in use else row for n, row in zip(numbers, sums, strict=True)])
        use.update(zip(numbers, sums.unbind(), strict=True))


@torch.no_grad()
def router_gradients(
    stats: Mapping[int, Tensor], sites: Sequence[Site], window: Window
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """(for each router the gradient of its adapter's losses with respect to its statistics, for each adapter their
    value)."""
    grads: dict[int, Tensor] = {}
    values: dict[str, Tensor] = {}
    for adapter in sorted({sites[number].adapter for number in stats}):
        numbers = [number for number in stats if sites[number].adapter == adapter]
        routers = [sites[number].router for number in numbers]
        device = stats[numbers[0]].device  # a model may lie on several
        starts = [common_size(router.num_gates) for router in routers]
        own = [stats[n].to(device)[start:] for n, start in zip(numbers, starts, strict=True)]
        infos = [
            SiteStats(part, router.num_gates, sites[number].layer)
            for part, router, number in zip(own, routers, numbers, strict=True)
        ]
        config = routers[0].config
        if config.pool_over != "micro":
            counted = split_statistics(stats[numbers[0]], routers[0].num_gates)[0]
            infos = window.pool(adapter, config, infos, counted["positions" if config.counts_padding else "tokens"])
        losses = config.losses(infos)
        values[adapter] = losses.value
        if len({(start, grad.shape) for start, grad in zip(starts, losses.grads, strict=True)}) == 1:
            whole = functional.pad(torch.stack(losses.grads), (starts[0], 0)).unbind()
        else:
            whole = tuple(functional.pad(g, (start, 0)) for g, start in zip(losses.grads, starts, strict=True))
        grads.update(zip(numbers, whole, strict=True))
    return grads, values
