"""A suite: the tasks of a YAML file that have an ``eval`` part, scored with one model into one results file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora.eval import results
from molora.eval.ranks import is_first
from molora.eval.score import load_examples, score_task
from molora.eval.strict import build, read_yaml
from molora.eval.tasks import TaskConfig, eval_task


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """Tasks to score, and the tokens that fit (``None``: the model's context)."""

    tasks: list[TaskConfig]
    max_length: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not any(task.eval for task in self.tasks):
            raise ValueError(
                f"no task has an eval section (tasks: {', '.join(names) or 'none'}); add one, `eval: {{}}` will do"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have the same name (tasks: {', '.join(names)}); rename one")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


def read_suite(path: str | Path) -> Suite:
    """Reads a suite file (``schema: molora.suite/1``) or the tasks of a recipe (``schema: molora.recipe/1``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: another schema, or a key that does not exist.
    """
    data = read_yaml(path)
    schema = data.pop("schema", None)
    if schema == "molora.recipe/1":
        sequence, evaluation = (data.get(key) or {} for key in ("sequence", "evaluation"))
        if not isinstance(sequence, dict) or not isinstance(evaluation, dict):
            raise ValueError(f"{path}: sequence and evaluation must be mappings of keys")
        data = {"tasks": data.get("tasks", []), "max_length": sequence.get("max_length")}
        data |= {key: evaluation[key] for key in ("batch_size",) if key in evaluation}
    elif schema != "molora.suite/1":
        raise ValueError(f"{path}: schema must be molora.suite/1 or molora.recipe/1, got {schema!r}")
    return build(Suite, data, str(path))


def merge_suites(suites: list[Suite]) -> Suite:
    """One suite with the tasks of all.

    Raises:
        ValueError: a task name occurs twice, or the suites differ in max_length or batch_size.
    """
    first = suites[0]
    for other in suites[1:]:
        if (other.max_length, other.batch_size) != (first.max_length, first.batch_size):
            raise ValueError(
                "the suites differ in max_length or batch_size; make them equal or evaluate them one by one"
            )
    return Suite(
        tasks=[task for suite in suites for task in suite.tasks],
        max_length=first.max_length,
        batch_size=first.batch_size,
    )


def check_suite(suite: Suite, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
    """Loads and encodes every row that would be scored, so that what cannot be scored is found before training.

    Raises:
        FileNotFoundError: no local file matches.
        ValueError: rows that cannot be read or encoded, or none that fits.
    """
    for task in suite.tasks:
        if task.eval:
            load_examples(eval_task(task), tokenizer, limit)


def run_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    name: str,
    predictions_path: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda task, rows, total: None,
) -> dict[str, Any]:
    """Scores every task of the suite that has an eval section; the model's train mode is as before afterwards.

    Args:
        model: a causal LM, with or without adapter.
        tokenizer: its tokenizer.
        suite: what to score.
        name: how the results name the model.
        predictions_path: JSON lines, one per scored row; ``None``: not written.
        seed: recorded. Scoring draws nothing: greedy generation, and rows drawn with seed 0.
        progress: told the task, the rows of each batch done, and the rows of the task.

    Returns:
        The results, schema ``molora.results/1``.
    """
    began, was_training = time.perf_counter(), model.training
    model.eval()
    entries: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    for task in (eval_task(task) for task in suite.tasks if task.eval):
        entries[task.name], rows = score_task(
            model,
            tokenizer,
            task,
            max_length=suite.max_length,
            batch_size=suite.batch_size,
            progress=partial(progress, task.name),
        )
        predictions += rows
    model.train(was_training)
    if predictions_path is not None and is_first():
        results.write_text(predictions_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
    return {
        **results.header(model, name, seed),
        "tasks": entries,
        "average": sum(entry["value"] for entry in entries.values()) / len(entries),
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": results.peak_memory_bytes(),
        "predictions": str(predictions_path) if predictions_path is not None else None,
    }
