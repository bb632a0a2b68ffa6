"""Packing: rows laid end to end, so that a batch holds no padding.

A batch is one line (1, T) of whole rows whose position ids begin again at 0 with each row. transformers and flash
attention read off these ids where a row begins, and so does molora; every token is a token of a row. Several padded
lines would let attention compare fewer pairs, but flash attention then takes no heed of position ids (it reads them for
one line only) and would look across rows without a word.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from molora.eval.encode import IGNORED
from molora.train.sampling import row_lengths

WINDOW = 4096
"""Rows that are packed together: few enough to stay in random order, and enough to fill nearly everything."""
STREAM_WINDOW = 512
"""The same of a stream, where the first step waits for them."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingReport:
    """What packing made of the rows; ``None`` where they are streamed."""

    max_length: int
    """Tokens that a packed sequence may hold."""
    sequences: int | None = None
    fill: float | None = None
    """Tokens over ``sequences * max_length``."""


def best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Row numbers in packs of at most `max_length` tokens: best fit, longest row first.

    Each row goes into the pack with the least room that still takes it. The packs, and the rows in each, come in the
    order of their numbers; a row above `max_length` has a pack of its own.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), rising
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        found = bisect_left(rooms, (lengths[row], 0))
        room, pack = rooms.pop(found) if found < len(rooms) else (max_length, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        insort(rooms, (room - lengths[row], pack))
    return sorted(sorted(pack) for pack in packs)


def pack_in_windows(lengths: np.ndarray, max_length: int, seed: int) -> list[np.ndarray]:
    """The rows in packs of at most `max_length` tokens; a function of the lengths and the seed alone.

    Rows are shuffled first, or the packs of a mixed set would each hold one task, and packed by `best_fit` in windows
    of `WINDOW`, or rows would meet by their length over the whole set.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    packs: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packs += [window[pack] for pack in best_fit(lengths[window].tolist(), max_length)]
    return packs


class PackedRows(TorchDataset[list[Row]]):
    """A table of rows as packs of rows, each drawn whole; made once, so that any epoch and any resume sees the same.

    Args:
        rows: a ``datasets.Dataset`` with ``input_ids`` and ``length``.
        max_length: tokens of a pack.
        seed: of the order in which rows meet.
    """

    def __init__(self, rows: Any, max_length: int, seed: int) -> None:
        self.rows = rows
        tokens = row_lengths(rows)
        packs = pack_in_windows(tokens, max_length, seed)
        # Two arrays and not a list of lists, which worker processes would copy page by page.
        self.order = np.concatenate(packs)
        self.starts = np.cumsum([0, *map(len, packs)])
        self.lengths = np.add.reduceat(tokens[self.order], self.starts[:-1])
        fill = float(tokens.sum()) / (len(packs) * max_length)
        self.report = PackingReport(max_length=max_length, sequences=len(packs), fill=fill)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> list[Row]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[list[Row]]:
        """The packs of a batch by one read of the table."""
        picked = [self.order[self.starts[n] : self.starts[n + 1]] for n in numbers]
        rows = self.rows.__getitems__(np.concatenate(picked).tolist())
        return [rows[start:end] for start, end in pairwise(np.cumsum([0, *map(len, picked)]).tolist())]


class PackedStream(TorchIterableDataset[list[Row]]):
    """A stream of rows as a stream of packs: `STREAM_WINDOW` rows are read and packed at a time.

    The order is a function of that of the rows, so that a run resumes by skipping what it has seen.
    """

    def __init__(self, rows: Any, max_length: int) -> None:
        self.rows, self.report = rows, PackingReport(max_length=max_length)

    def __iter__(self) -> Iterator[list[Row]]:
        source = iter(self.rows)
        while rows := list(islice(source, STREAM_WINDOW)):
            for pack in best_fit([len(row["input_ids"]) for row in rows], self.report.max_length):
                yield [rows[number] for number in pack]


def collate_packed(packs: Sequence[Sequence[Row]], *, with_task_labels: bool = False) -> dict[str, torch.Tensor]:
    """Packs of rows to one line. A row's first token has no label, for the token before it is another row's.

    Returns:
        ``input_ids``, ``position_ids``, ``labels``, ``task``: (1, T) int64 on the CPU, T the tokens of all packs;
        ``task_labels`` (1, T) if asked for. There is no attention mask: transformers heeds position ids without one
        only.
    """
    rows = [row for pack in packs for row in pack]
    lengths = [len(row["input_ids"]) for row in rows]

    def line(parts: Sequence[Any]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False)).unsqueeze(0)

    def of_rows(key: str) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array([int(row[key]) for row in rows]), lengths)).unsqueeze(0)

    batch = {
        "input_ids": line([row["input_ids"] for row in rows]),
        "position_ids": line([np.arange(length) for length in lengths]),
        "labels": line([row["labels"] for row in rows]),
        "task": of_rows("task"),
    }
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED)
    return batch | ({"task_labels": of_rows("task_label")} if with_task_labels else {})


def packed(rows: Any, max_length: int, seed: int) -> PackedRows | PackedStream:
    """The rows of a table or of a stream, packed."""
    if isinstance(rows, TorchIterableDataset):
        return PackedStream(rows, max_length)
    return PackedRows(rows, max_length, seed)
