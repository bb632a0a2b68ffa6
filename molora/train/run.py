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

from molora.eval.disk import check_directory, writing
from molora.eval.encode import collate
from molora.eval.models import load_base, load_tokenizer
from molora.eval.results import header, peak_memory_bytes, write_json, write_text
from molora.eval.score import context_length
from molora.eval.suite import check_suite, run_suite
from molora.train.checkpoint import AtomicTrainer
from molora.train.mixing import TaskReport, mixed_dataset
from molora.train.output import (
    BEFORE_FILE,
    CURVE_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    find_checkpoint,
    finished_state,
    mean_loss,
    stored_results,
)
from molora.train.recipe import Recipe, adapter_config, recipe_yaml


def prepare(recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase, Any, list[TaskReport]]:
    """Loads the base, adds the adapter, and tokenizes the tasks; the same seed gives the same initial weights.

    Everything that would stop the run later is checked here: the training settings, ``output_dir``, and the rows that
    are scored.

    Returns:
        The PEFT model, its tokenizer, the mixed training set (``datasets.Dataset``) and one report per task.

    Raises:
        ValueError: a setting, a task or its evaluation that cannot run.
    """
    seed = training_arguments(recipe).seed
    check_directory(recipe.output_dir, "training.output_dir")
    base = load_base(recipe.base.model, dtype=recipe.base.dtype, quantization=recipe.base.quantization)
    tokenizer = load_tokenizer(recipe.base.model)
    limit = context_length(base, recipe.sequence.max_length)
    if recipe.suite is not None and (recipe.evaluation.before or recipe.evaluation.after):
        check_suite(recipe.suite, tokenizer, limit)
    rows, reports = mixed_dataset(recipe.tasks, tokenizer, recipe.mixing, recipe.sequence, limit)
    set_seed(seed)
    return get_peft_model(base, adapter_config(recipe)), tokenizer, rows, reports


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's ``training`` section over molora's defaults: no reporting service, molora's own progress bar.

    Raises:
        ValueError: a value that transformers does not take, or that this machine cannot serve.
    """
    defaults = {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_first_step": True,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    try:
        return TrainingArguments(**defaults | recipe.training, remove_unused_columns=False)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"recipe.training: {error}") from error


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
            threads the losses are those of the uninterrupted run, bit for bit. Where the last step was saved, only
            what came after it is done; a complete run is left as it is and its results are returned.
        show_reports: told the model and the counts of every task before the first step.
        callbacks: more Trainer callbacks.
        score_progress: told the task, the rows of each batch done, and the rows of the task, during evaluation.

    Returns:
        The results, schema ``molora.results/1``; the scores before training are under ``"before"``.
    """
    began = time.perf_counter()
    checkpoint = find_checkpoint(recipe, resume=resume)
    done = stored_results(recipe) if resume else None
    if done is not None:
        return done
    finished = finished_state(checkpoint)
    model, tokenizer, rows, reports = prepare(recipe)
    show_reports(model, reports)
    args = training_arguments(recipe)
    trainer = _trainer(recipe, args, model, tokenizer, rows, callbacks or [])
    # Only now, so that a recipe whose data cannot be read does not claim the directory.
    with writing(str(recipe.output_dir), "make room and start again"):
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(recipe.output_dir / RECIPE_FILE, recipe_yaml(recipe))

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

    with writing(f"the scores in {recipe.output_dir}", "make room and continue with --resume"):
        before = _before(recipe, score, resume=resume)
    if finished is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        # Another call of train would take one more step.
        trainer.state = finished
        model.load_adapter(checkpoint, "default", is_trainable=True)
    trainer.save_final()
    with writing(f"the results in {recipe.output_dir}", "the adapter is whole; make room and continue with --resume"):
        write_json(recipe.output_dir / CURVE_FILE, trainer.state.log_history)
        results = score("after") or _unscored(recipe, model, args.seed)
        results |= {
            "before": before,
            "training": {
                "steps": trainer.state.global_step,
                "loss": mean_loss(trainer.state.log_history),
                "data": [asdict(report) for report in reports],
                "resumed_from": checkpoint,
            },
            "seconds": time.perf_counter() - began,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(recipe.output_dir / RESULTS_FILE, results)
    return results


def _trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    callbacks: list[TrainerCallback],
) -> AtomicTrainer:
    try:
        trainer = AtomicTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[*([RoutingLog()] if recipe.mixture is not None else []), *callbacks],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        # For instance report_to for a service that is not installed, or fp16 without a GPU.
        raise ValueError(f"recipe.training: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


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
        from molora.telemetry import routing_statistics

        loads = [site["load"] for site in routing_statistics(model).values()]
        if loads and state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1]["largest_load"] = max(float((load / load.sum()).max()) for load in loads)
