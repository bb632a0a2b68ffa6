"""Training rows of all tasks, tokenized, counted and interleaved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from molora.eval.encode import IGNORED, encode_row
from molora.eval.rows import load_rows
from molora.eval.tasks import TaskConfig
from molora.train.recipe import MixingConfig, SequenceConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
    """Loads and tokenizes the training rows of one task.

    Args:
        task: the task.
        tokenizer: the base model's.
        sequence: what to do with rows above ``limit``.
        limit: tokens; ``None``: no limit.

    Returns:
        Columns ``input_ids`` and ``labels``, and the counts.

    Raises:
        ValueError: no row is left, or a row is too long under ``too_long: error``.
    """
    rows = load_rows(task)
    # No cache: datasets finds a cached result by the function's name, so another version's tokens could come back.
    encoded = rows.map(
        encode_row,
        fn_kwargs={"task": task, "tokenizer": tokenizer},
        remove_columns=rows.column_names,
        load_from_cache_file=False,
        desc=task.name,
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    too_long = sum(limit is not None and length > limit for length in lengths)
    if too_long and sequence.too_long == "error":
        raise ValueError(
            f"task {task.name!r}: {too_long} of {len(rows)} rows exceed {limit} tokens, the longest has "
            f"{max(lengths)}; raise sequence.max_length, or set sequence.too_long to report or truncate"
        )
    if too_long and sequence.too_long == "truncate":
        encoded = encoded.map(truncate, fn_kwargs={"limit": limit}, load_from_cache_file=False)
    elif too_long:
        encoded = encoded.select([index for index, length in enumerate(lengths) if length <= (limit or length)])
    label_tokens = [sum(label != IGNORED for label in labels) for labels in encoded["labels"]]
    kept = [index for index, count in enumerate(label_tokens) if count > 0]
    if len(kept) < len(encoded):
        encoded = encoded.select(kept)
    report = TaskReport(
        name=task.name,
        rows=len(rows),
        used=len(kept),
        too_long=too_long,
        no_label=len(label_tokens) - len(kept),
        tokens=sum(map(len, encoded["input_ids"])),
        label_tokens=sum(label_tokens),
        unknown_tokens=sum(encoded["num_unknown"]),
    )
    if not kept:
        raise ValueError(
            f"task {task.name!r} is empty: of {len(rows)} rows, {too_long} exceed {limit} tokens and {report.no_label} "
            "have no token with loss; raise sequence.max_length or check the answers"
        )
    return encoded.remove_columns("num_unknown"), report


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
        Columns ``input_ids``, ``labels``, ``task`` (its position) and ``task_label``, and one report per task.
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
