"""The keys and plain values of the recipe's ``training`` (TrainingArguments) and ``lora`` (LoraConfig) sections."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from molora.suggest import unknown_key_message

_PLAIN = (bool, int, float, str, list, dict)

# Set by molora, or served by another section; a setting that would be ignored is an error.
REFUSED_KEYS = {
    "eval_strategy": "use the evaluation section",
    "load_best_model_at_end": "there is no evaluation inside the loop to choose by; use the evaluation section",
    "metric_for_best_model": "there is no evaluation inside the loop to choose by; use the evaluation section",
    "resume_from_checkpoint": "use --resume",
    "logging_nan_inf_filter": "a loss that is not finite stops the run instead of being hidden",
    "remove_unused_columns": "molora's collator needs every column it is given",
    "push_to_hub": "push the saved adapter with PeftModel.push_to_hub",
}
# Values that TrainingArguments takes, and that fail or train nothing later.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "save_total_limit": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "seed": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
}
ABOVE_0 = ("num_train_epochs", "logging_steps", "save_steps")


def check_training(training: dict[str, Any]) -> None:
    """Checks keys and plain values; what only this machine can tell is left to TrainingArguments itself.

    Raises:
        ValueError: one sentence that names the key.
    """
    if "output_dir" not in training:
        raise ValueError("recipe.training lacks the key output_dir; add the directory for checkpoints and the adapter")
    for key, value in training.items():
        where = f"recipe.training.{key}"
        if key in REFUSED_KEYS:
            raise ValueError(f"{where} is not for a recipe: {REFUSED_KEYS[key]}; remove it")
        if key not in _types():
            close = difflib.get_close_matches(key, _types(), n=1, cutoff=0.5)
            hint = f": did you mean {close[0]!r}? The" if close else "; the"
            raise ValueError(
                f"unknown key {key!r} in recipe.training{hint} keys are those of transformers.TrainingArguments"
            )
        _check_type(where, value, str if key == "output_dir" else _types()[key])
        if value is None:
            continue
        if key in AT_LEAST and value < AT_LEAST[key]:
            raise ValueError(f"{where}={value} must be at least {AT_LEAST[key]}")
        if key in ABOVE_0 and value <= 0:
            raise ValueError(f"{where}={value} must be above 0")
        if key == "max_steps" and value < 1 and value != -1:
            raise ValueError(f"{where}={value} must be at least 1, or -1 to count epochs")
    if not training["output_dir"].strip():
        raise ValueError("recipe.training.output_dir is empty; give the directory for checkpoints and the adapter")


def check_streaming(training: dict[str, Any]) -> None:
    """Refuses what a stream, which has no length and no end, cannot serve.

    Raises:
        ValueError: one sentence that names the key.
    """
    if training.get("max_steps") in (None, -1):
        raise ValueError("mixing.streaming needs recipe.training.max_steps, because a stream has no end; set it")
    sampling = training.get("train_sampling_strategy")
    if sampling not in (None, "random"):
        raise ValueError(
            f"recipe.training.train_sampling_strategy={sampling!r} needs all rows at once, which mixing.streaming does "
            "not have; remove one of the two"
        )
    if (training.get("dataloader_num_workers") or 0) > 1:
        raise ValueError(
            f"recipe.training.dataloader_num_workers={training['dataloader_num_workers']}: each worker would read the "
            "same stream; set it to 0 or 1 with mixing.streaming"
        )
    accelerator = training.get("accelerator_config")
    if accelerator is not None and not isinstance(accelerator, dict):
        raise ValueError("recipe.training.accelerator_config must be a mapping of keys with mixing.streaming")
    if (accelerator or {}).get("dispatch_batches"):
        raise ValueError(
            "recipe.training.accelerator_config.dispatch_batches=true would join batches of different lengths; remove "
            "it, with mixing.streaming each process reads its own rows"
        )


def check_packing(training: dict[str, Any]) -> None:
    """Refuses what would join packed batches, each of them one line of its own length.

    Raises:
        ValueError: one sentence that names the key.
    """
    accelerator = training.get("accelerator_config") or {}
    if isinstance(accelerator, dict) and accelerator.get("dispatch_batches"):
        raise ValueError(
            "recipe.training.accelerator_config.dispatch_batches=true would join packed batches of different lengths; "
            "remove it, with sequence.packing each process reads its own rows"
        )


def check_services(training: dict[str, Any]) -> None:
    """Refuses a reporting service that is not installed.

    Raises:
        ValueError: names the service and the package.
    """
    named = training.get("report_to") or []
    for service in [named] if isinstance(named, str) else named:
        if service in ("tensorboard", "wandb") and find_spec(service) is None:
            raise ValueError(
                f"recipe.training.report_to names {service!r}, which is not installed; pip install 'molora[telemetry]'"
            )
        if service == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            import wandb

            if not wandb.api.api_key:
                raise ValueError(
                    "recipe.training.report_to names 'wandb', which has no key here; run `wandb login`, or set "
                    "WANDB_MODE=offline"
                )


def check_lora(keys: dict[str, Any]) -> None:
    """Checks keys and the types of plain values of peft.LoraConfig, which fails at some far later.

    Raises:
        ValueError: one sentence that names the key.
    """
    from peft import LoraConfig

    hints = get_type_hints(LoraConfig)
    known = {field.name for field in fields(LoraConfig) if field.init}
    for key, value in keys.items():
        if key not in known:
            raise ValueError(unknown_key_message("recipe.lora", key, known))
        # PEFT scales by any number, whatever its annotation says.
        _check_type(f"recipe.lora.{key}", value, float if key == "lora_alpha" else hints[key])


def _check_type(where: str, value: Any, annotation: Any) -> None:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    plain = tuple(t for t in (get_origin(option) or option for option in options) if t in _PLAIN)
    # Enumerations and the like are checked by the library itself.
    if len(plain) + (type(None) in options) < len(options) or (value is None and type(None) in options):
        return
    if isinstance(value, bool):
        fits = bool in plain
    else:
        fits = isinstance(value, plain) or (float in plain and isinstance(value, int))
    if not fits:
        names = " or ".join(sorted(option.__name__ for option in plain))
        hint = "; write one = between key and value" if isinstance(value, str) and value.startswith("=") else ""
        raise ValueError(f"{where} must be of type {names}, got {value!r}{hint}")


@cache
def _types() -> dict[str, Any]:
    from transformers import TrainingArguments

    # It is annotated as text for its old spelling, and takes true.
    hints = get_type_hints(TrainingArguments) | {"fsdp": bool | str | None}
    return {field.name: hints[field.name] for field in fields(TrainingArguments) if field.init}
