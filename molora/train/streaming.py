"""Training rows of all tasks as one endless stream: read, encoded, shuffled and interleaved while training goes on."""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset as TorchIterableDataset

from molora.eval.encode import IGNORED, encode_row
from molora.eval.rows import local_files, stream_rows
from molora.eval.tasks import TaskConfig
from molora.eval.unreadable import why_unreadable
from molora.train.mixing import TaskReport, probabilities, truncate
from molora.train.recipe import MixingConfig, SequenceConfig

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

BUFFER_SIZE = 1000
"""Rows of each task to draw the next from, where the recipe does not say."""
_ONE_AT_A_TIME = threading.Lock()
"""datasets reads the tasks of a stream in threads, and transformers renders a chat template in one thread only."""
COLUMNS = ["input_ids", "labels", "task", "task_label"]


class MixedStream(TorchIterableDataset[dict[str, Any]]):
    """Rows of every task, drawn by ``shares``, pass after pass without end.

    A pass ends when every row of every task has come at least once; the next one is shuffled with the next seed. The
    order is a function of the seed and of whether a worker process reads the rows (datasets shifts a worker's seed). To
    the trainer it is one epoch, so that a run resumes by skipping the batches that it has seen.

    Args:
        tasks: the encoded rows of each task.
        shares: the probability of each task.
        mixing: its seed and the rows of the buffer that is drawn from.
    """

    def __init__(self, tasks: Sequence[EncodedStream], shares: Sequence[float], mixing: MixingConfig) -> None:
        self.tasks, self.shares, self.mixing = tasks, list(shares), mixing

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _naming([stream.task for stream in self.tasks]):
            for seed in count(self.mixing.seed):
                yield from self._pass(seed)

    def _pass(self, seed: int) -> IterableDataset:
        import datasets

        return datasets.interleave_datasets(
            [task.rows(seed=seed, buffer_size=self.mixing.buffer_size or BUFFER_SIZE) for task in self.tasks],
            probabilities=self.shares,
            seed=seed,
            stopping_strategy="all_exhausted",
        )

    def first(self, number: int) -> Iterator[dict[str, Any]]:
        """The first rows of each task in the order of its data, task after task."""
        for stream in self.tasks:
            with _naming([stream.task]):
                yield from stream.rows().take(number)


@contextmanager
def _naming(tasks: Sequence[TaskConfig]) -> Iterator[None]:
    """What a reader raises at a later row becomes one sentence that names the task and the file."""
    try:
        yield
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        # What molora raises is a plain ValueError that names the task; readers raise kinds of it that do not.
        if type(error) is ValueError:
            raise
        for task in tasks:
            reason = why_unreadable(local_files(task))
            if reason:
                raise ValueError(f"task {task.name!r} cannot be read from {task.data!r}: {reason}") from error
        names = ", ".join(task.name for task in tasks)
        raise ValueError(f"a row of one of the tasks {names} cannot be read: {error}") from error


class EncodedStream:
    """The rows of one task, encoded as they are read. Rows without loss are left out, long ones as ``too_long`` says.

    Raises:
        ValueError: the data cannot be read, a column is missing, or no row is left.
    """

    def __init__(
        self,
        task: TaskConfig,
        tokenizer: PreTrainedTokenizerBase,
        sequence: SequenceConfig,
        limit: int | None,
        number: int,
        label: int,
    ) -> None:
        self.task, self.tokenizer, self.sequence, self.limit = task, tokenizer, sequence, limit
        self.constants = {"task": number, "task_label": label}
        self.source = stream_rows(task)
        with _naming([task]):
            first = next(iter(self.rows()), None)
        if first is None:
            raise ValueError(
                f"task {task.name!r} is empty: each of its rows exceeds {limit} tokens or has no token with loss; "
                "raise sequence.max_length or check the answers"
            )

    def rows(self, *, seed: int | None = None, buffer_size: int = 1) -> IterableDataset:
        """The columns of :data:`COLUMNS`; shuffled if there is a seed."""
        # Shuffled before they are encoded, so that the first step waits for reading a buffer and not for its tokens.
        source = self.source if seed is None else self.source.shuffle(seed=seed, buffer_size=buffer_size)
        return source.map(self._encode).filter(self._is_used).select_columns(COLUMNS)

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        with _ONE_AT_A_TIME:
            encoded = encode_row(row, self.task, self.tokenizer)
        length = len(encoded["input_ids"])
        if self.limit is not None and length > self.limit:
            if self.sequence.too_long == "error":
                raise ValueError(
                    f"task {self.task.name!r}: a row of {length} tokens exceeds {self.limit}; raise "
                    "sequence.max_length, or set sequence.too_long to report or truncate"
                )
            if self.sequence.too_long == "truncate":
                encoded |= truncate(encoded, self.limit)
        return encoded | self.constants

    def _is_used(self, row: dict[str, Any]) -> bool:
        fits = self.limit is None or len(row["input_ids"]) <= self.limit
        return fits and any(label != IGNORED for label in row["labels"])

    @property
    def size(self) -> int:
        """Rows of the task: what it says, or the hub's card; at most its limit.

        Raises:
            ValueError: neither says it.
        """
        # What datasets knows of a local file depends on whether it was read before.
        splits = {} if local_files(self.task) else self.source.info.splits or {}
        size = self.task.size or (splits[self.task.split].num_examples if self.task.split in splits else None)
        if not size:
            raise ValueError(
                f"task {self.task.name!r}: mixing.strategy needs the rows of a streamed task, and {self.task.data!r} "
                "does not tell them; set the task's size, or mixing.strategy to weights"
            )
        return min(size, self.task.limit or size)


def mixed_stream(
    tasks: Sequence[TaskConfig],
    tokenizer: PreTrainedTokenizerBase,
    mixing: MixingConfig,
    sequence: SequenceConfig,
    limit: int | None,
    labels: Sequence[int],
) -> tuple[MixedStream, list[TaskReport]]:
    """The tasks as one stream; as :func:`molora.train.mixing.mixed_dataset`, but nothing is counted before training.

    Args:
        labels: the task label of each task.

    Returns:
        Rows with ``input_ids``, ``labels``, ``task`` (its position) and ``task_label``, and one report per task.

    Raises:
        ValueError: what the first rows show: unreadable data, a missing column, no row that fits; or an unknown size.
    """
    streams = [
        EncodedStream(task, tokenizer, sequence, limit, number, label)
        for number, (task, label) in enumerate(zip(tasks, labels, strict=True))
    ]
    sizes = [None if mixing.strategy == "weights" else stream.size for stream in streams]
    shares = probabilities([size or 1 for size in sizes], [task.weight for task in tasks], mixing)
    reports = [
        TaskReport(name=task.name, rows=size, probability=share)
        for task, size, share in zip(tasks, sizes, shares, strict=True)
    ]
    return MixedStream(streams, shares, mixing), reports
