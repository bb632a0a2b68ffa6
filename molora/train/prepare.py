"""What is there before the first step: the settings, the base with its adapter, the mixed rows; or why it cannot be."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from molora.config import MoloraConfig
from molora.eval.disk import check_directory
from molora.eval.encode import collate
from molora.eval.memory import enough_memory
from molora.eval.models import load_base, load_tokenizer
from molora.eval.score import context_length
from molora.eval.suite import check_suite
from molora.init_experts import initialize_eva_weights
from molora.integrations.deepspeed import whole
from molora.train.engine import deepspeed_config, engine_arguments, partitions
from molora.train.flops import peak_flops
from molora.train.mixing import TaskReport, mixed_dataset
from molora.train.packable import check_packable
from molora.train.packing import PackedRows, PackedStream, packed
from molora.train.recipe import Recipe, adapter_config, mixture_of_adapters
from molora.train.settings import check_services
from molora.train.streaming import MixedStream, mixed_stream

EXAMPLES = 64
"""Training rows of each task that make a centroid."""


def prepare(recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase, Any, list[TaskReport]]:
    """Loads the base, adds the adapter, and tokenizes the tasks; the same seed gives the same initial weights.

    Everything that would stop the run later is checked here: the training settings, ``output_dir``, and the rows that
    are scored.

    Returns:
        The PEFT model, its tokenizer, the mixed training set (``datasets.Dataset`` or
        :class:`molora.train.streaming.MixedStream`, or what :mod:`molora.train.packing` makes of them) and one report
        per task.

    Raises:
        ValueError: a setting, a task or its evaluation that cannot run.
    """
    args = training_arguments(recipe)
    check_optimizer(recipe, args)
    peak_flops(args.device)
    if recipe.base.quantization is not None and partitions(args):
        raise ValueError(
            f"base.quantization={recipe.base.quantization!r} cannot be partitioned: every process would hold the whole "
            "base all the same; use --deepspeed zero2 or no engine, or leave quantization out"
        )
    seed = args.seed
    check_directory(recipe.output_dir, "training.output_dir")
    with enough_memory("loading the base", lambda: "set base.dtype to bfloat16, or base.quantization to nf4"):
        base = load_base(
            recipe.base.model,
            dtype=recipe.base.dtype,
            quantization=recipe.base.quantization,
            place=not partitions(args),
        )
    tokenizer = load_tokenizer(recipe.base.model)
    limit = context_length(base, recipe.sequence.max_length)
    if recipe.suite is not None and (recipe.evaluation.before or recipe.evaluation.after):
        check_suite(recipe.suite, tokenizer, limit)
    config = adapter_config(recipe)
    router = getattr(config, "router", None)
    if recipe.sequence.packing:
        check_packable(base, limit, router)
    if router is not None and router.has_centroids and router.reads_text:
        raise ValueError(
            f"mixture.router.embedder={router.embedder!r} reads text, which training does not have; train "
            "with embedder 'base'"
        )
    if router is not None and router.has_centroids and config.num_experts != len(recipe.tasks):
        raise ValueError(
            f"mixture.num_experts={config.num_experts} does not fit a {router.name} router, which has an expert for "
            f"each task; set mixture.num_experts={len(recipe.tasks)}"
        )
    labels = task_labels(recipe, config)
    mix = mixed_stream if recipe.mixing.streaming else mixed_dataset
    with args.main_process_first(local=True):
        rows, reports = mix(recipe.tasks, tokenizer, recipe.mixing, recipe.sequence, limit, labels)
    set_seed(seed)
    if recipe.mixture is not None and "adapters" in recipe.mixture:
        model = mixture_of_adapters(base, recipe.mixture)
        _check_trainable(model, config)
    else:
        model = get_peft_model(base, config)
    if router is not None and router.has_centroids:
        with whole(base):
            model.set_centroids(example_texts(rows, recipe, tokenizer), tokenizer)
    if recipe.sequence.packing:
        assert limit is not None
        rows = packed(rows, limit, recipe.mixing.seed)
    return model, tokenizer, rows, reports


def task_labels(recipe: Recipe, config: Any) -> list[int]:
    """The task label of each task: its own, or the number of the imported expert of its name, or its position.

    Raises:
        ValueError: a router loss that tells fewer tasks apart, or a task without an expert of its name.
    """
    labels = [i if task.task_label is None else task.task_label for i, task in enumerate(recipe.tasks)]
    names = list((recipe.mixture or {}).get("adapters", ()))
    if names:
        for i, task in enumerate(recipe.tasks):
            if task.task_label is None and task.name not in names:
                raise ValueError(
                    f"task {task.name!r} has no expert of its name among mixture.adapters ({', '.join(names)}); rename "
                    "it, or set its task_label to the number of its expert"
                )
            labels[i] = names.index(task.name) if task.task_label is None else task.task_label
    router = getattr(config, "router", None)
    known = 0 if router is None else router.task_labels(fewest(config.num_experts))
    for task, label in zip(recipe.tasks, labels, strict=True):
        if known and label >= known:
            raise ValueError(
                f"task {task.name!r} has task label {label}, but the router's loss tells {known} tasks apart (0 to "
                f"{known - 1}); set its task_label"
                + (", or mixture.num_experts to the number of tasks" if known > 2 else "")
            )
    return labels


def _check_trainable(model: PeftModel, config: Any) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"router {config.router.name!r} needs no training and the imported experts are frozen; use `molora convert "
            "--adapters`, or set mixture.freeze_experts: false to train the experts on"
        )


def fewest(num_experts: int | list[int]) -> int:
    """The number of experts, or the smallest of several."""
    return num_experts if isinstance(num_experts, int) else min(num_experts)


def example_texts(rows: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """The texts of each task's first training rows, for centroids: one expert for each task."""
    texts: dict[int, list[str]] = {}
    for row in rows.first(EXAMPLES) if isinstance(rows, MixedStream) else rows.select_columns(["input_ids", "task"]):
        own = texts.setdefault(row["task"], [])
        if len(own) < EXAMPLES:
            own.append(tokenizer.decode(row["input_ids"], skip_special_tokens=True))
    return {task.name: texts.get(i, []) for i, task in enumerate(recipe.tasks)}


def initialize_from_data(model: PeftModel, rows: Any, batch_size: int) -> None:
    """EVA by batches of training rows, of a stream the first ones of each task; by PEFT's own call for one LoRA."""
    rows = rows.rows if isinstance(rows, (PackedRows, PackedStream)) else rows
    rows = list(rows.first(EXAMPLES)) if isinstance(rows, MixedStream) else rows

    def batch(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        made = collate(items)
        return {key: made[key] for key in ("input_ids", "attention_mask", "labels")}

    loader: Any = DataLoader(rows, batch_size=batch_size, collate_fn=batch)
    if isinstance(model.active_peft_config, MoloraConfig):
        initialize_eva_weights(model, loader)
    else:
        initialize_lora_eva_weights(model, loader, show_progress_bar=False)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's ``training`` section over molora's defaults: no reporting service, molora's own progress bar.

    Raises:
        ValueError: a value that transformers does not take, or that this machine cannot serve.
    """
    defaults = {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        # Without it transformers takes processes without a GPU for so many lone ones.
        "use_cpu": not torch.accelerator.is_available(),
    }
    streamed: dict[str, Any] = {}
    if recipe.mixing.streaming:
        # Each process reads its own rows: one that dispatches would join batches that are padded to other lengths.
        streamed["accelerator_config"] = (recipe.training.get("accelerator_config") or {}) | {"dispatch_batches": False}
    check_services(recipe.training)
    options = defaults | recipe.training | engine_arguments(recipe.training) | streamed
    try:
        args = TrainingArguments(**options, remove_unused_columns=False)
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process would copy the model to all its GPUs; several GPUs want a launcher
        return args
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"recipe.training: {error}") from error


def check_optimizer(recipe: Recipe, args: Any) -> None:
    """Refuses a second optimizer beside that of LoRA+.

    Raises:
        ValueError: DeepSpeed's config makes one of its own.
    """
    if recipe.optimizer.loraplus_lr_ratio is not None and "optimizer" in deepspeed_config(args):
        raise ValueError(
            "optimizer.loraplus_lr_ratio makes the optimizer, and so does the section optimizer of "
            "recipe.training.deepspeed; remove one of them"
        )
