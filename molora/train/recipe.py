"""The recipe: one YAML file, read downwards, that says everything about a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from molora.eval.strict import apply_overrides, build, read_yaml
from molora.eval.suite import Suite
from molora.eval.tasks import TaskConfig
from molora.suggest import unknown_key_message
from molora.train.engine import check_engine
from molora.train.optimizer import OptimizerConfig
from molora.train.settings import check_lora, check_packing, check_streaming, check_training

SCHEMA = "molora.recipe/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseConfig:
    """The frozen base model."""

    model: str
    """Hub id or local directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "nf4_double", "int8"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    """How often each task is drawn: p(task) ~ weight * size^(1 / temperature)."""

    strategy: Literal["proportional", "temperature", "weights"] = "proportional"
    """``proportional``: temperature 1. ``weights``: infinite temperature, only the weights count."""
    temperature: float | None = None
    """Above 0; required by ``temperature``, refused by the others."""
    seed: int = 0
    streaming: bool = False
    """Read rows while training goes on, instead of all of them before it; an epoch then has no end."""
    buffer_size: int | None = None
    """Rows of each task from which a stream draws the next one; ``None``: 1000."""

    def __post_init__(self) -> None:
        if (self.strategy == "temperature") != (self.temperature is not None):
            raise ValueError(
                f"mixing: strategy {self.strategy!r} with temperature={self.temperature}; a temperature goes with "
                "strategy 'temperature' and with no other"
            )
        if self.seed < 0:
            raise ValueError(f"mixing: seed={self.seed} must be at least 0")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"mixing: temperature={self.temperature} must be above 0")
        if self.buffer_size is not None and not self.streaming:
            raise ValueError("mixing: buffer_size is for streaming; remove it, or set mixing.streaming: true")
        if self.buffer_size is not None and self.buffer_size < 1:
            raise ValueError(f"mixing: buffer_size={self.buffer_size} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """How long an example may be."""

    max_length: int | None = None
    """Tokens; ``None``: the model's context."""
    packing: bool = False
    """Rows are laid end to end, whole ones up to ``max_length`` tokens; a batch then holds no padding."""
    cache: bool = True
    """Tokens are kept in datasets' cache directory for the next run of the same data, task, tokenizer and limits."""
    too_long: Literal["report", "error", "truncate"] = "report"
    """``report``: leave out and count. ``truncate``: cut the end and count."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"sequence: max_length={self.max_length} must be at least 2 tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """When the tasks' eval parts are scored."""

    before: bool = True
    after: bool = True
    batch_size: int = 32
    """Rows per forward."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"evaluation.batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole training run. Exactly one of ``mixture`` and ``lora`` says what is trained."""

    schema: Literal["molora.recipe/1"]
    base: BaseConfig
    mixture: dict[str, Any] | None = None
    """Keys of MoloraConfig, and ``preset``: a published system whose keys they override; and ``adapters``: LoRAs that
    become the experts, by name."""
    lora: dict[str, Any] | None = None
    """Keys of peft.LoraConfig: the one-LoRA baseline, trained by the same loop on the same data."""
    tasks: list[TaskConfig]
    mixing: MixingConfig = MixingConfig()
    sequence: SequenceConfig = SequenceConfig()
    training: dict[str, Any]
    """Keys of transformers.TrainingArguments."""
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        if (self.mixture is None) == (self.lora is None):
            raise ValueError("recipe: give exactly one of the sections mixture and lora")
        if not self.tasks:
            raise ValueError("recipe: tasks is empty; add at least one task")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"recipe: two tasks have the same name (tasks: {', '.join(names)}); rename one")
        check_training(self.training)
        check_engine(self.training)
        self._check_optimizer()
        if self.mixing.streaming:
            check_streaming(self.training)
        if self.sequence.packing:
            check_packing(self.training)
        for task in self.tasks:
            # A slice or a sum of splits needs all rows.
            if self.mixing.streaming and any(symbol in task.split for symbol in "[+"):
                raise ValueError(
                    f"task {task.name!r}: mixing.streaming reads a whole split, not {task.split!r}; set split to one "
                    "name and limit to the rows to train on"
                )
            if task.size is not None and not self.mixing.streaming:
                raise ValueError(
                    f"task {task.name!r}: size={task.size} is for mixing.streaming; remove it, the rows are counted"
                )
        adapter_config(self)

    def _check_optimizer(self) -> None:
        riemannian = self.optimizer.riemannian
        if riemannian and self.mixture is None:
            raise ValueError(
                f"optimizer.riemannian={riemannian!r} is for a mixture, and peft.LoraConfig has nothing like it; "
                "remove it, or train the section mixture"
            )
        own = (self.mixture or {}).get("riemannian", riemannian)
        if riemannian and own != riemannian:
            raise ValueError(
                f"optimizer.riemannian={riemannian!r} and mixture.riemannian={own!r} differ; give one of them"
            )

    @property
    def output_dir(self) -> Path:
        """Where checkpoints, the adapter and the results go."""
        return Path(self.training["output_dir"])

    @property
    def suite(self) -> Suite | None:
        """The tasks' eval parts; ``None`` without any."""
        if not any(task.eval for task in self.tasks):
            return None
        return Suite(tasks=self.tasks, max_length=self.sequence.max_length, batch_size=self.evaluation.batch_size)


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe, applies ``key.sub=value`` overrides, and checks every key at every depth.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one sentence that names the section, the key, and the nearest valid key.
    """
    return build(Recipe, apply_overrides(read_yaml(path), overrides or []), "recipe")


def with_deepspeed(recipe: Recipe, name: str) -> Recipe:
    """The recipe with ``training.deepspeed`` set.

    Raises:
        ValueError: the recipe has one, or there is no such configuration.
    """
    own = recipe.training.get("deepspeed")
    if own is not None:
        raise ValueError(
            f"--deepspeed {name} and recipe.training.deepspeed={own!r} both choose the engine; give one of them"
        )
    return replace(recipe, training={**recipe.training, "deepspeed": name})


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that reads back to the same recipe; keys at their default ``None`` are left out."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return [without_none(item) for item in value] if isinstance(value, list) else value

    return yaml.safe_dump(without_none(asdict(recipe)), sort_keys=False, allow_unicode=True, width=120)


def adapter_config(recipe: Recipe) -> Any:
    """The PEFT config that the recipe's ``mixture`` or ``lora`` section names; a new object at each call.

    Raises:
        ValueError: a key that the config does not have.
    """
    if recipe.mixture is not None:
        riemannian = recipe.optimizer.riemannian
        return mixture_config(recipe.mixture | ({"riemannian": riemannian} if riemannian else {}))
    from peft import LoraConfig

    assert recipe.lora is not None
    check_lora(recipe.lora)
    return LoraConfig(**{"task_type": "CAUSAL_LM"} | recipe.lora)


def mixture_config(keys: dict[str, Any]) -> Any:
    """A MoloraConfig from the keys of a recipe's mixture section or of ``molora convert``; ``preset`` names a preset.

    With ``adapters``, names and paths of LoRA adapters, the config is one of as many experts; `mixture_of_adapters`
    makes the model.

    Raises:
        ValueError: a key that MoloraConfig does not have, at any depth.
    """
    from molora import MoloraConfig

    if "adapters" in keys:
        adapters, router, options = _imported(keys)
        return MoloraConfig(
            **{"freeze_experts": True, **options}, router=router, num_experts=len(adapters), expert_names=list(adapters)
        )
    keys = dict(keys)
    preset = keys.pop("preset", None)
    valid = [field.name for field in fields(MoloraConfig)]
    for key in keys:
        if key not in valid:
            raise ValueError(unknown_key_message("MoloraConfig", key, [*valid, "preset"]))
    return MoloraConfig(**keys) if preset is None else MoloraConfig.from_preset(preset, **keys)


def _imported(keys: dict[str, Any]) -> tuple[dict[str, str], Any, dict[str, Any]]:
    """(adapters by name, router, other keys of MoloraConfig) of a mixture made of adapters; of a preset only what the
    adapters leave open is used."""
    from molora.adapters.from_adapters import check_options
    from molora.presets import preset_options

    keys = dict(keys)
    adapters = keys.pop("adapters")
    if not isinstance(adapters, dict) or not all(isinstance(path, str) for path in adapters.values()):
        raise ValueError("mixture.adapters must map the name of each expert to a LoRA adapter: {sql: ./sql-lora}")
    preset = keys.pop("preset", None)
    router = keys.pop("router", None)
    check_options(adapters, keys)
    if preset is not None:
        named = preset_options(preset, {} if router is None else {"router": router})
        router, keys = named["router"], {k: v for k, v in named.items() if k == "placement"} | keys
        check_options(adapters, keys)
    elif router is None or isinstance(router, dict):
        router = {"name": "arrow", **(router or {})}
    return adapters, router, keys


def mixture_of_adapters(
    base: Any, keys: dict[str, Any], general: Sequence[str] = (), allow_partial: bool = False
) -> Any:
    """`molora.from_adapters` with the keys of a recipe's mixture section that has ``adapters``.

    Raises:
        ValueError: as `from_adapters`.
    """
    from molora import from_adapters

    adapters, router, options = _imported(keys)
    return from_adapters(base, adapters, router, general=general, allow_partial=allow_partial, **options)
