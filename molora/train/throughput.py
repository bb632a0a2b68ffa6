"""How fast a run trains and how much memory it takes, for its log: tokens per second, model FLOPs utilisation, peak."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molora.context import Runtime, runtime_of
from molora.eval.results import peak_memory_bytes
from molora.record import token_mask
from molora.telemetry import active_share
from molora.train.finite import over_ranks
from molora.train.flops import peak_flops, step_flops


class Throughput:
    """Counts on the device between two lines of the log, and makes figures of all ranks at a line.

    Args:
        model: with its adapter; of a model without a mixture there are no router losses.
        device: where the batches are.
    """

    def __init__(self, model: nn.Module, device: Any) -> None:
        self.device = torch.device(device)
        self.model, self.flops, self.peak = model, step_flops(model), peak_flops(self.device)
        try:
            self.runtime: Runtime | None = runtime_of(model)
        except ValueError:
            self.runtime = None
        self._start()

    def _start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # tokens, squares of lengths
        self.router_losses: dict[str, Tensor] = {}
        self.micro_batches = 0
        self.began = time.perf_counter()

    @torch.no_grad()
    def add(self, batch: Mapping[str, Any]) -> None:
        """Counts one micro-batch, after its backward.

        Args:
            batch: ``input_ids`` (B, S), and if it has them ``attention_mask`` and ``position_ids`` (B, S).
        """
        ids, positions = batch["input_ids"], batch.get("position_ids")
        real = token_mask(batch.get("attention_mask"))
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.view_as(ids)
        if positions is None:
            positions = real.cumsum(-1) - 1
        # A sequence of n tokens: 1 + 3 + 5 + ... + (2n - 1) = n^2, also where several lie in one row.
        counted = torch.stack([real.sum(), ((2 * positions + 1) * real).sum()])
        self.sums += counted.to(self.sums)
        self.micro_batches += 1
        for adapter, value in (self.runtime.losses if self.runtime is not None else {}).items():
            self.router_losses[adapter] = self.router_losses.get(adapter, 0) + value.detach().double()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside, such as that of saving, is no time of training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    def collect(self) -> dict[str, float]:
        """The figures since the last call, over all ranks. One sum and one maximum over ranks; called on all of them.

        Returns:
            ``tokens_per_second`` (tokens of all ranks that are no padding), ``mfu`` where the peak is known,
            ``peak_memory_gib`` (the largest of any rank, since the process began) and ``router_loss``, the mean over
            the micro-batches, or ``router_loss/<adapter>`` of several.
        """
        if not self.micro_batches:
            return {}
        names = sorted(self.router_losses)
        values = [self.router_losses[name].to(self.sums) / self.micro_batches for name in names]
        summed = over_ranks(torch.stack([*self.sums, self.sums.new_ones(()), *values]), "SUM").tolist()
        (tokens, squares, ranks), losses = summed[:3], summed[3:]
        # The clock is read behind the copy, when the device has done what was asked of it.
        times = self.sums.new_tensor([time.perf_counter() - self.began, peak_memory_bytes()])
        seconds, memory = over_ranks(times, "MAX").tolist()
        logs = {"tokens_per_second": tokens / seconds, "peak_memory_gib": memory / 2**30}
        if self.peak is not None:
            active = active_share(self.runtime)
            logs["mfu"] = self.flops.count(tokens, squares, active) / (seconds * ranks * self.peak)
        for name, loss in zip(names, losses, strict=True):
            logs["router_loss" if len(names) == 1 else f"router_loss/{name}"] = loss / ranks
        self._start()
        return logs
