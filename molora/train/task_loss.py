"""The training loss of each task, for the log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from molora.eval.encode import IGNORED
from molora.window import sum_over_ranks

CHUNK = 512
"""Tokens whose logits are copied at a time."""


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
            tasks: (B,) or, of packed rows, (B, S) int64.
        """
        sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=logits.device)
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        # Packed, a label is of the same row as the token before it, or ignored.
        of_tokens = tasks.view(len(labels), -1).expand_as(labels).flatten()
        parts = logits.flatten(0, 1).split(CHUNK), targets.split(CHUNK), of_tokens.split(CHUNK)
        for part, wanted, numbers in zip(*parts, strict=True):
            # Part by part: a float copy of all logits would be the largest tensor of the step.
            losses = functional.cross_entropy(part.float(), wanted, ignore_index=IGNORED, reduction="none")
            sums[0].index_add_(0, numbers, losses.double())
            sums[1].index_add_(0, numbers, (wanted != IGNORED).double())
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def sums(self) -> Tensor | None:
        """(tasks,) the sums of the token losses since the last `collect`, on this process."""
        return None if self._sums is None else self._sums[0]

    def collect(self) -> dict[str, float]:
        """``loss/<task>``: the mean token loss of each task that was seen since the last call, on any rank.

        One sum over ranks; called on all of them.
        """
        if self._sums is None:
            return {}
        total, count = sum_over_ranks(self._sums.clone()).tolist()
        self._sums = None
        return {f"loss/{name}": t / n for name, t, n in zip(self.names, total, count, strict=True) if n}
