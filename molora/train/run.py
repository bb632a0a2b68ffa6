"""One training run: recipe in; checkpoints, adapter, loss curve and results out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from molora.eval.encode import collate
from molora.eval.models import load_base, load_tokenizer
from molora.eval.results import header, peak_memory_bytes, write_json
from molora.eval.score import context_length
from molora.eval.strict import parse_yaml
from molora.eval.suite import run_suite
from molora.train.checkpoint import AtomicTrainer
from molora.train.mixing import TaskReport, mixed_dataset
from molora.train.recipe import Recipe, adapter_config, recipe_yaml

RECIPE_FILE, RESULTS_FILE, BEFORE_FILE, CURVE_FILE = "recipe.yaml", "results.json", "before.json", "loss_curve.json"


def prepare(recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase, Any, list[TaskReport]]:
    """Loads the base, adds the adapter, and tokenizes the tasks; the same seed gives the same initial weights.

    Returns:
        The PEFT model, its tokenizer, the mixed training set (``datasets.Dataset``) and one report per task.
    """
    tokenizer = load_tokenizer(recipe.base.model)
    base = load_base(recipe.base.model, dtype=recipe.base.dtype, quantization=recipe.base.quantization)
    limit = context_length(base, recipe.sequence.max_length)
    rows, reports = mixed_dataset(recipe.tasks, tokenizer, recipe.mixing, recipe.sequence, limit)
    set_seed(training_arguments(recipe).seed)
    return get_peft_model(base, adapter_config(recipe)), tokenizer, rows, reports


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's ``training`` section over molora's defaults: no reporting service, molora's own progress bar."""
    defaults = {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_first_step": True,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    return TrainingArguments(**defaults | recipe.training, remove_unused_columns=False)


def find_checkpoint(recipe: Recipe, *, resume: bool) -> str | None:
    """Checks that ``output_dir`` is free or, with ``resume``, holds a run of the same recipe.

    Returns:
        The checkpoint to resume from, ``None`` to start from the first step.

    Raises:
        ValueError: the directory holds another run, or the recipe differs from the one that began here.
    """
    saved = recipe.output_dir / RECIPE_FILE
    if not resume:
        if saved.exists() or (recipe.output_dir.is_dir() and get_last_checkpoint(str(recipe.output_dir))):
            raise ValueError(
                f"{recipe.output_dir} already holds a run; pass --resume to continue it, "
                "or choose another training.output_dir"
            )
    elif saved.is_file():
        began, now = _flat(parse_yaml(saved.read_text(encoding="utf-8"))), _flat(parse_yaml(recipe_yaml(recipe)))
        changed = sorted(key for key in began.keys() | now.keys() if began.get(key) != now.get(key))
        if changed:
            shown = ", ".join(f"{key}: {began.get(key)!r} -> {now.get(key)!r}" for key in changed[:5])
            raise ValueError(
                f"--resume continues the run exactly as it began, but the recipe changed ({shown}); "
                "undo that or start anew"
            )
    return get_last_checkpoint(str(recipe.output_dir)) if resume and recipe.output_dir.is_dir() else None


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{path}.{key}" if path else str(key)).items()}


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    show_reports: Callable[[PeftModel, list[TaskReport]], None] = lambda model, reports: None,
    callbacks: list[TrainerCallback] | None = None,
    score_progress: Callable[[str, int, int], None] = lambda task, rows, total: None,
) -> dict[str, Any]:
    """Runs a recipe: scores, trains, saves, scores again.

    ``output_dir`` receives ``recipe.yaml`` (resolved), ``checkpoint-N``, the adapter with its tokenizer,
    ``loss_curve.json`` (the trainer's log), ``before.json`` and ``results.json``.

    Args:
        recipe: what to do.
        resume: continue from the last whole checkpoint in ``output_dir``. On one process with the same number of
            threads the losses are those of the uninterrupted run, bit for bit.
        show_reports: told the model and the counts of every task before the first step.
        callbacks: more Trainer callbacks.
        score_progress: told the task, the rows of each batch done, and the rows of the task, during evaluation.

    Returns:
        The results, schema ``molora.results/1``; the scores before training are under ``"before"``.
    """
    began = time.perf_counter()
    checkpoint = find_checkpoint(recipe, resume=resume)
    model, tokenizer, rows, reports = prepare(recipe)
    show_reports(model, reports)
    # Only now, so that a recipe whose data cannot be read does not claim the directory.
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    (recipe.output_dir / RECIPE_FILE).write_text(recipe_yaml(recipe), encoding="utf-8")
    args = training_arguments(recipe)

    def score(when: str) -> dict[str, Any] | None:
        if recipe.suite is None or not getattr(recipe.evaluation, when):
            return None
        predictions = recipe.output_dir / f"predictions_{when}.jsonl"
        return run_suite(
            model,
            tokenizer,
            recipe.suite,
            name=str(recipe.output_dir),
            predictions_path=predictions,
            seed=args.seed,
            progress=score_progress,
        )

    before = _before(recipe, score, resume=resume)
    trainer = AtomicTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[*([RoutingLog()] if recipe.mixture is not None else []), *(callbacks or [])],
    )
    trainer.remove_callback(PrinterCallback)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_final()
    write_json(recipe.output_dir / CURVE_FILE, trainer.state.log_history)
    results = score("after") or _unscored(recipe, model, args.seed)
    results |= {
        "before": before,
        "training": {
            "steps": trainer.state.global_step,
            "loss": outcome.training_loss,
            "data": [asdict(report) for report in reports],
            "resumed_from": checkpoint,
        },
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_json(recipe.output_dir / RESULTS_FILE, results)
    return results


def _before(recipe: Recipe, score: Callable[[str], dict[str, Any] | None], *, resume: bool) -> dict[str, Any] | None:
    """Scores before training; a resumed run reads what it scored when it began."""
    path = recipe.output_dir / BEFORE_FILE
    if resume and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    before = score("before")
    if before is not None:
        before = {key: before[key] for key in ("tasks", "average", "predictions")}
        write_json(path, before)
    return before


def _unscored(recipe: Recipe, model: PeftModel, seed: int) -> dict[str, Any]:
    return header(model, str(recipe.output_dir), seed) | {"tasks": {}, "average": None, "predictions": None}


class RoutingLog(TrainerCallback):
    """Adds the largest expert load over all sites to each line of the log; one host sync per logged step."""

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from molora.context import routing_statistics

        loads = [site["load"] for site in routing_statistics(model).values()]
        if loads and state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1]["largest_load"] = max(float((load / load.sum()).max()) for load in loads)
