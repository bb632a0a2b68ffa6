"""What `molora train --dry-run` finds out beyond the checks of `prepare`: schedule, samples with their loss, memory."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from molora.eval.encode import IGNORED
from molora.eval.score import context_length
from molora.train.memory_estimate import MemoryEstimate, estimate_memory
from molora.train.prepare import training_arguments
from molora.train.recipe import Recipe
from molora.train.run import make_trainer

MEASURED = 1000
"""Items of the training set, in its order, whose tokens are counted."""
SEARCHED = 10_000
"""Items that are searched for a sample of each task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long the run is.

    Attributes:
        rows_per_step: over all processes and accumulated micro-batches; of packed rows, packs.
        steps_per_epoch: ``None`` of a stream, which has no end.
        tokens_per_step: on average, without padding.
        learning_rates: by step; the first, where the warm-up ends, quarters, and the last. Empty where it depends on
            the losses.
    """

    rows_per_step: int
    steps_per_epoch: int | None
    max_steps: int
    warmup_steps: int
    scheduler: str
    tokens_per_step: int
    learning_rates: dict[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A training row of a task: each token as text, and whether it carries loss."""

    task: str
    tokens: list[tuple[str, bool]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What there is to know before a run."""

    schedule: Schedule
    samples: list[Sample]
    memory: MemoryEstimate


def dry_run(recipe: Recipe, prepared: tuple[Any, Any, Any, Any]) -> DryRun:
    """Describes the run that `recipe` would be; some small steps are measured, nothing is trained or written.

    Args:
        recipe: what would be done.
        prepared: what :func:`molora.train.prepare.prepare` returned; its model is not to be trained after this.

    Raises:
        ValueError: the trainer refuses a setting.
    """
    model, tokenizer, rows, _ = prepared
    args = training_arguments(recipe)
    with tempfile.TemporaryDirectory() as args.output_dir:  # a trainer makes it, and so would claim the run's own
        trainer = make_trainer(recipe, args, model, tokenizer, rows, [], warnings.warn)
    first = [_rows_of(item) for item in islice(_items(rows), MEASURED)]
    packed = recipe.sequence.packing
    limit = context_length(model, recipe.sequence.max_length)
    longest = limit if packed else _longest(rows, first)
    assert longest is not None
    memory = estimate_memory(trainer, args.per_device_train_batch_size, longest, packed)
    return DryRun(schedule=_schedule(trainer, first), samples=_samples(recipe, tokenizer, rows), memory=memory)


def _items(rows: Any) -> Iterator[Any]:
    """The items of a table or a stream; what a table is not asked for is not read."""
    return (rows[i] for i in range(len(rows))) if hasattr(rows, "__len__") else iter(rows)


def _rows_of(item: Any) -> list[dict[str, Any]]:
    """The rows of an item: one, or those of a pack."""
    return item if isinstance(item, list) else [item]


def _longest(rows: Any, first: list[list[dict[str, Any]]]) -> int:
    """Tokens of the longest row: of the whole table, or of the first rows of a stream."""
    lengths = [len(row["input_ids"]) for item in first for row in item]
    table = getattr(rows, "data", None)  # of datasets.Dataset: every row is drawn at least once
    if table is not None:
        import pyarrow.compute as pc

        lengths.append(pc.max(pc.list_value_length(table.column("input_ids"))).as_py())
    return max(lengths)


def _schedule(trainer: Trainer, first: list[list[dict[str, Any]]]) -> Schedule:
    args = trainer.args
    counted = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    steps_per_epoch, rows_per_step, in_epoch, max_steps = counted[1], counted[4], counted[5], counted[6]
    warmup = args.get_warmup_steps(max_steps)
    mean = sum(len(row["input_ids"]) for item in first for row in item) / len(first)
    return Schedule(
        rows_per_step=rows_per_step,
        steps_per_epoch=None if in_epoch is None or not hasattr(trainer.train_dataset, "__len__") else steps_per_epoch,
        max_steps=max_steps,
        warmup_steps=warmup,
        scheduler=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        tokens_per_step=round(mean * rows_per_step),
        learning_rates=_learning_rates(trainer, max_steps, warmup),
    )


def _learning_rates(trainer: Trainer, max_steps: int, warmup: int) -> dict[int, float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=trainer.args.learning_rate)
    factors = getattr(trainer.create_scheduler(max_steps, optimizer), "lr_lambdas", None)
    if factors is None:
        return {}
    steps = {1, warmup + 1, max_steps // 4, max_steps // 2, 3 * max_steps // 4, max_steps}
    return {step: trainer.args.learning_rate * factors[0](step - 1) for step in sorted(steps) if 1 <= step <= max_steps}


def _samples(recipe: Recipe, tokenizer: Any, rows: Any) -> list[Sample]:
    """The first row of each task, as far as one comes early enough."""
    found: dict[int, dict[str, Any]] = {}
    for item in islice(_items(rows), SEARCHED):
        for row in _rows_of(item):
            found.setdefault(row["task"], row)
        if len(found) == len(recipe.tasks):
            break
    samples = []
    for i, task in enumerate(recipe.tasks):
        if i in found:
            pieces = _pieces(found[i]["input_ids"], tokenizer)
            loss = [label != IGNORED for label in found[i]["labels"]]
            samples.append(Sample(task=task.name, tokens=list(zip(pieces, loss, strict=True))))
    return samples


def _pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds after the one before it: alone, a token would lose the space in front of it."""
    texts = [tokenizer.decode(ids[max(0, i - 1) : i + 1]) for i in range(len(ids))]
    before = ["", *(tokenizer.decode([token]) for token in ids[:-1])]
    return [text[len(known) :] for text, known in zip(texts, before, strict=True)]
