"""Training rows of all tasks, tokenized, counted and interleaved."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from molora.eval.encode import IGNORED, encode_row
from molora.eval.rows import load_rows
from molora.eval.tasks import TaskConfig
from molora.train.recipe import MixingConfig, SequenceConfig
from molora.train.token_cache import cache_key, cached

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROWS_PER_PROCESS = 10_000
"""Fewer are tokenized before another process would have started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskReport:
    """What became of one task's rows. Nothing is left out without being counted here; ``None`` where it is streamed."""

    name: str
    rows: int | None
    """Of a streamed task: what mixing takes for its size, if it needs one."""
    used: int | None = None
    too_long: int | None = None
    """Rows above the length limit: left out (``report``) or cut (``truncate``)."""
    no_label: int | None = None
    """Rows left out because no token carries loss."""
    tokens: int | None = None
    label_tokens: int | None = None
    unknown_tokens: int | None = None
    """Tokens that are the tokenizer's unknown symbol."""
    probability: float = 0.0
    """Share of the draws."""


def encode_task(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sequence: SequenceConfig, limit: int | None
) -> tuple[Dataset, TaskReport]:
    """Loads and tokenizes the training rows of one task, or finds them tokenized.

    Args:
        task: the task.
        tokenizer: the base model's.
        sequence: what to do with rows above ``limit``, and whether tokens are kept for the next run.
        limit: tokens; ``None``: no limit.

    Returns:
        Columns ``input_ids``, ``labels`` (lists of int32) and ``length``, and the counts.

    Raises:
        ValueError: no row is left, or a row is too long under ``too_long: error``.
    """

    def make() -> tuple[Dataset, dict[str, Any]]:
        return _encode_rows(task, tokenizer, sequence.too_long, limit)

    if sequence.cache:
        key = cache_key(task, tokenizer, {"too_long": sequence.too_long, "limit": limit})
        rows, counts = cached(key, make)
    else:
        rows, counts = make()
    return rows, TaskReport(name=task.name, **counts)


def _encode_rows(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, too_long: str, limit: int | None
) -> tuple[Dataset, dict[str, Any]]:
    """The rows of `encode_task`, and the counts of their `TaskReport`."""
    from datasets import Features, List, Value

    rows = load_rows(task)
    number, numbers = Value("int32"), List(Value("int32"))
    counted = dict.fromkeys(("length", "whole_length", "label_tokens", "num_unknown"), number)
    # datasets' own cache is off: it knows a function by its name, so another version's tokens could come back.
    encoded = rows.map(
        _encode,
        fn_kwargs={"task": task, "tokenizer": tokenizer, "limit": limit if too_long == "truncate" else None},
        remove_columns=rows.column_names,
        features=Features({"input_ids": numbers, "labels": numbers, **counted}),
        load_from_cache_file=False,
        num_proc=_processes(len(rows)),
        desc=task.name,
    )
    counts = encoded.select_columns(list(counted)).with_format("numpy")[:]
    lengths = counts["whole_length"]
    exceed = lengths > (max(lengths) if limit is None else limit)
    if exceed.any() and too_long == "error":
        raise ValueError(
            f"task {task.name!r}: {exceed.sum()} of {len(rows)} rows exceed {limit} tokens, the longest has "
            f"{max(lengths)}; raise sequence.max_length, or set sequence.too_long to report or truncate"
        )
    fits = ~exceed | (too_long == "truncate")
    used = fits & (counts["label_tokens"] > 0)
    found = {
        "rows": len(rows),
        "used": int(used.sum()),
        "too_long": int(exceed.sum()),
        "no_label": int(fits.sum() - used.sum()),
        "tokens": int(counts["length"][used].sum()),
        "label_tokens": int(counts["label_tokens"][used].sum()),
        "unknown_tokens": int(counts["num_unknown"][used].sum()),
    }
    if not used.any():
        raise ValueError(
            f"task {task.name!r} is empty: of {len(rows)} rows, {found['too_long']} exceed {limit} tokens and "
            f"{found['no_label']} have no token with loss; raise sequence.max_length or check the answers"
        )
    return encoded.select(used.nonzero()[0]).select_columns(["input_ids", "labels", "length"]), found


def _encode(
    row: dict[str, Any], task: TaskConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, Any]:
    encoded = encode_row(row, task, tokenizer)
    cut = truncate(encoded, limit)
    return cut | {
        "length": len(cut["input_ids"]),
        "whole_length": len(encoded["input_ids"]),
        "label_tokens": sum(label != IGNORED for label in cut["labels"]),
        "num_unknown": encoded["num_unknown"],
    }


def _processes(rows: int) -> int | None:
    """How many tokenize: one for every `ROWS_PER_PROCESS` rows, at most one per core; ``None``: this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, rows // ROWS_PER_PROCESS)
    return processes if processes > 1 else None


def truncate(row: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """The first ``limit`` tokens of a row."""
    return {"input_ids": row["input_ids"][:limit], "labels": row["labels"][:limit]}


def probabilities(sizes: Sequence[int], weights: Sequence[float], mixing: MixingConfig) -> list[float]:
    """p(task) ~ weight * size^(1 / temperature); temperature 1 is ``proportional``, infinity is ``weights``.

    Args:
        sizes: rows per task.
        weights: > 0 per task.
        mixing: the strategy.

    Returns:
        Probabilities that sum to one.
    """
    exponent = {"proportional": 1.0, "weights": 0.0, "temperature": 1.0 / (mixing.temperature or math.inf)}[
        mixing.strategy
    ]
    scores = [weight * size**exponent for size, weight in zip(sizes, weights, strict=True)]
    return [score / sum(scores) for score in scores]


def mixed_dataset(
    tasks: Sequence[TaskConfig],
    tokenizer: PreTrainedTokenizerBase,
    mixing: MixingConfig,
    sequence: SequenceConfig,
    limit: int | None,
    labels: Sequence[int],
) -> tuple[Dataset, list[TaskReport]]:
    """One epoch: every row of every task at least once, tasks drawn by :func:`probabilities`.

    Proportional mixing with equal weights is plain concatenation, each row once. Otherwise rows of a task that is
    drawn more often than its size come again. The dataset is map-style and its order is a function of the seed alone;
    the trainer shuffles it and skips to any step without reading rows.

    Args:
        labels: the task label of each task.

    Returns:
        Columns ``input_ids``, ``labels``, ``length``, ``task`` (its position) and ``task_label``, and one report per
        task.
    """
    import datasets

    encoded, counts = zip(*(encode_task(task, tokenizer, sequence, limit) for task in tasks), strict=True)
    shares = probabilities([len(rows) for rows in encoded], [task.weight for task in tasks], mixing)
    reports = [
        TaskReport(**asdict(report) | {"probability": share}) for report, share in zip(counts, shares, strict=True)
    ]
    encoded = tuple(
        rows.add_column("task", [i] * len(rows)).add_column("task_label", [label] * len(rows))
        for i, (rows, label) in enumerate(zip(encoded, labels, strict=True))
    )
    if mixing.strategy == "proportional" and len({task.weight for task in tasks}) == 1:
        return datasets.concatenate_datasets(list(encoded)), reports
    mixed = datasets.interleave_datasets(
        list(encoded), probabilities=shares, seed=mixing.seed, stopping_strategy="all_exhausted"
    )
    return mixed, reports
