"""One training run: recipe in; checkpoints, adapter, loss curve and results out."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from molora.eval.disk import writing
from molora.eval.encode import collate
from molora.eval.memory import enough_memory
from molora.eval.ranks import is_first, wait_for_all
from molora.eval.results import header, peak_memory_bytes, write_json
from molora.eval.suite import run_suite
from molora.integrations.deepspeed import whole
from molora.train.checkpoint import LogAtSaves
from molora.train.data_note import check_data_files, write_data_files
from molora.train.engine import partitions
from molora.train.global_batch import write_global_batch
from molora.train.mixing import TaskReport
from molora.train.output import (
    BEFORE_FILE,
    CURVE_FILE,
    RESULTS_FILE,
    claim,
    find_checkpoint,
    finished_state,
    mean_loss,
    stored_results,
)
from molora.train.packing import PackedRows, PackedStream, collate_packed
from molora.train.prepare import fewest, initialize_from_data, prepare, training_arguments
from molora.train.recipe import Recipe
from molora.train.routing_log import RoutingLog
from molora.train.smaller_steps import smaller_steps
from molora.train.task_loss import TaskLosses
from molora.train.watched import WatchedTrainer


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    show_reports: Callable[[PeftModel, list[TaskReport], Any], None] = lambda model, reports, rows: None,
    callbacks: list[TrainerCallback] | None = None,
    score_progress: Callable[[str, int, int], None] = lambda task, rows, total: None,
    warn: Callable[[str], Any] = warnings.warn,
) -> dict[str, Any]:
    """Runs a recipe: scores, trains, saves, scores again.

    ``output_dir`` receives ``recipe.yaml`` (resolved), ``checkpoint-N``, the adapter with its tokenizer,
    ``loss_curve.json`` (the trainer's log), ``before.json`` and ``results.json``.

    Args:
        recipe: what to do.
        resume: continue from the last whole checkpoint in ``output_dir``. On one process with the same number of
            threads the losses are those of the uninterrupted run, bit for bit. Where the last step was saved, only
            what came after it is done; a complete run is left as it is and its results are returned.
        show_reports: told the model, the counts of every task and the training set before the first step.
        callbacks: more Trainer callbacks.
        score_progress: told the task, the rows of each batch done, and the rows of the task, during evaluation.
        warn: told a sentence about a router that has collapsed, or a checkpoint that is damaged.

    Returns:
        The results, schema ``molora.results/1``; the scores before training are under ``"before"``.

    Raises:
        ValueError: as :func:`prepare`; or the data changed since the run began that is to be resumed.
        FloatingPointError: a loss or gradient is not finite.
        MemoryError: the memory does not suffice.
        OSError: the disk is full.
    """
    began = time.perf_counter()
    checkpoint = find_checkpoint(recipe, resume=resume, warn=warn)
    done = stored_results(recipe) if resume else None
    if done is not None:
        return done
    if resume:
        check_data_files(recipe.output_dir, recipe.tasks)
    finished = finished_state(checkpoint)
    with writing(
        "the tokenized rows in the cache of datasets", "make room there, or point HF_DATASETS_CACHE elsewhere"
    ):
        model, tokenizer, rows, reports = prepare(recipe)
    show_reports(model, reports, rows)
    args = training_arguments(recipe)
    if checkpoint is None and getattr(model.active_peft_config, "init_lora_weights", None) == "eva":
        with whole(model):
            initialize_from_data(model, rows, args.per_device_train_batch_size)
    trainer = make_trainer(recipe, args, model, tokenizer, rows, callbacks or [], warn)
    # Only now, so that a recipe whose data cannot be read does not claim the directory, and every process saw it free.
    wait_for_all()
    with writing(str(recipe.output_dir), "make room and start again"):
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        if is_first():
            claim(recipe, resume=resume)
            write_global_batch(recipe.output_dir, recipe.training)
            write_data_files(recipe.output_dir, recipe.tasks)

    def score(when: str) -> dict[str, Any] | None:
        if recipe.suite is None or not getattr(recipe.evaluation, when):
            return None
        predictions = recipe.output_dir / f"predictions_{when}.jsonl"
        size = recipe.evaluation.batch_size
        with enough_memory("scoring", lambda: f"lower evaluation.batch_size ({size}) and start anew"):
            return run_suite(
                model,
                tokenizer,
                recipe.suite,
                name=str(recipe.output_dir),
                predictions_path=predictions,
                seed=args.seed,
                progress=score_progress,
            )

    before: dict[str, Any] | None = None

    def score_before() -> None:
        nonlocal before
        with writing(f"the scores in {recipe.output_dir}", "make room and continue with --resume"):
            before = _before(recipe, score, resume=resume)

    if partitions(args):
        trainer.when_prepared = score_before
    else:
        score_before()
    if finished is None:
        with (
            enough_memory("a training step", partial(smaller_steps, recipe, args)),
            writing("the log", "make room and continue with --resume"),
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
    elif partitions(args):
        trainer.prepare_finished(finished, checkpoint)
    else:
        # Another call of train would take one more step.
        trainer.state = finished
        model.load_adapter(checkpoint, "default", is_trainable=True)
    trainer.save_final()
    with writing(f"the results in {recipe.output_dir}", "the adapter is whole; make room and continue with --resume"):
        if is_first():
            write_json(recipe.output_dir / CURVE_FILE, trainer.state.log_history)
        results = score("after") or _unscored(recipe, model, args.seed)
        results |= {
            "before": before,
            "training": {
                "steps": trainer.state.global_step,
                "loss": mean_loss(trainer.state.log_history),
                "data": [asdict(report) for report in reports],
                "packing": asdict(rows.report) if isinstance(rows, (PackedRows, PackedStream)) else None,
                "resumed_from": checkpoint,
            },
            "seconds": time.perf_counter() - began,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if is_first():
            write_json(recipe.output_dir / RESULTS_FILE, results)
    return results


def make_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    callbacks: list[TrainerCallback],
    warn: Callable[[str], Any],
) -> WatchedTrainer:
    router = getattr(model.active_peft_config, "router", None)
    labelled = router is not None and router.task_labels(fewest(model.active_peft_config.num_experts)) > 0
    try:
        trainer = WatchedTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=partial(collate_packed if recipe.sequence.packing else collate, with_task_labels=labelled),
            processing_class=tokenizer,
            callbacks=[LogAtSaves(), *callbacks],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        # For instance report_to for a service that is not installed, or fp16 without a GPU.
        raise ValueError(f"recipe.training: {error}") from error
    trainer.loraplus_lr_ratio = recipe.optimizer.loraplus_lr_ratio
    trainer.remove_callback(PrinterCallback)
    if recipe.mixture is not None:
        # In front of the reporting services, which get what is in the line when their turn comes.
        trainer.callback_handler.callbacks.insert(0, RoutingLog(warn))
    trainer.task_losses = TaskLosses([task.name for task in recipe.tasks])
    return trainer


def _before(recipe: Recipe, score: Callable[[str], dict[str, Any] | None], *, resume: bool) -> dict[str, Any] | None:
    """Scores before training; a resumed run reads what it scored when it began."""
    path = recipe.output_dir / BEFORE_FILE
    if resume and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    before = score("before")
    if before is not None:
        before = {key: before[key] for key in ("tasks", "average", "predictions")}
        if is_first():
            write_json(path, before)
    return before


def _unscored(recipe: Recipe, model: PeftModel, seed: int) -> dict[str, Any]:
    return header(model, str(recipe.output_dir), seed) | {"tasks": {}, "average": None, "predictions": None}
