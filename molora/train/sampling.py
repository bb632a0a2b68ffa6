"""An order of training rows in which the rows of a batch are of like length, so that little is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

BATCHES_PER_POOL = 50
"""Rows are sorted by length within a random pool of this many batches; the batches of a pool come in random order."""


def row_lengths(rows: Any) -> np.ndarray:
    """(n,) the tokens of each row of a table with a column ``length``, or of each pack of rows."""
    if hasattr(rows, "lengths"):
        return rows.lengths
    return rows.select_columns(["length"]).with_format("numpy")[:]["length"]


class LengthGroupedSampler(Sampler[int]):
    """Row numbers in an order that is a function of ``(seed, epoch)`` alone.

    transformers has a sampler of this name that draws from torch's global generator, so that a resumed run sees another
    order from the second epoch on. Here a run that resumes inside any epoch continues exactly.

    Args:
        lengths: tokens of each row.
        batch_size: rows of the batches that all processes read at the same time, so that none waits for a longer one;
            processes take consecutive batches.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch, and when a run resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        for pool in order.split(BATCHES_PER_POOL * self.batch_size):
            batches = pool[self.lengths[pool].argsort(descending=True, stable=True)].split(self.batch_size)
            # A short last batch stays last, or every batch behind it would straddle two lengths.
            full = len(pool) // self.batch_size
            for index in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]:
                yield from batches[index].tolist()
