"""The training loss of each task, for the log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from molora.eval.encode import IGNORED
from molora.window import sum_over_ranks


class TaskLosses:
    """Sums of token losses by task, on the device until they are asked for.

    Args:
        names: of the tasks, by their number in the batches.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Adds one micro-batch.

        Args:
            logits: (B, S, V) of the model.
            labels: (B, S), unshifted, -100 where no loss is taken.
            tasks: (B,) int64.
        """
        sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=logits.device)
        for row, targets, task in zip(logits, labels[:, 1:], tasks, strict=True):
            # Row by row: a float copy of all logits would be the largest tensor of the step.
            loss = functional.cross_entropy(row[:-1].float(), targets, ignore_index=IGNORED, reduction="sum")
            sums[0].index_add_(0, task.view(1), loss.double().view(1))
            sums[1].index_add_(0, task.view(1), (targets != IGNORED).sum().double().view(1))
        self._sums = sums if self._sums is None else self._sums + sums

    def collect(self) -> dict[str, float]:
        """``loss/<task>``: the mean token loss of each task since the last call, over all processes; all call it."""
        if self._sums is None:
            return {}
        total, count = sum_over_ranks(self._sums).tolist()
        self._sums = None
        return {f"loss/{name}": t / n for name, t, n in zip(self.names, total, count, strict=True) if n}
