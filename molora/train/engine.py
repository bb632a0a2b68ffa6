"""The engine that runs a recipe: the trainer's own (DDP on several processes), DeepSpeed's ZeRO, or FSDP2."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from pathlib import Path
from typing import Any

_FILES = Path(__file__).with_name("engines")
CONFIGS = {name: _FILES / f"{name}.json" for name in ("zero1", "zero2", "zero3", "zero3-offload")}
"""DeepSpeed configurations that come with molora, by name; what the trainer knows is ``auto`` in them."""


def check_engine(training: dict[str, Any]) -> None:
    """Checks ``deepspeed``, ``fsdp`` and ``fsdp_config`` of a recipe's training section.

    Raises:
        ValueError: a configuration that does not exist or cannot be read, two engines, or an FSDP setting under which
            an adapter could not be trained or saved.
    """
    deepspeed, fsdp = training.get("deepspeed"), training.get("fsdp")
    if isinstance(deepspeed, str):
        deepspeed = _read_json("recipe.training.deepspeed", deepspeed_path(deepspeed))
    if isinstance(deepspeed, dict):
        zero = deepspeed.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            raise ValueError(f"recipe.training.deepspeed: zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    if not fsdp:
        return
    if deepspeed:
        raise ValueError("recipe.training has both deepspeed and fsdp; a run has one engine, so remove one of them")
    config = training.get("fsdp_config") or {}
    config = _read_json("recipe.training.fsdp_config", Path(config)) if isinstance(config, str) else config
    found = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    if int(found.get("version", 2)) != 2:
        raise ValueError(
            f"recipe.training.fsdp_config.version={found['version']} flattens parameters, frozen and trained ones "
            "together, which an adapter cannot have; set it to 2"
        )
    if "FULL" not in str(found.get("state_dict_type", "FULL_STATE_DICT")):
        raise ValueError(
            f"recipe.training.fsdp_config.state_dict_type={found['state_dict_type']} saves pieces and no adapter; "
            "remove it, FULL_STATE_DICT is the default"
        )
    if str(found.get("cpu_ram_efficient_loading", False)).lower() == "true":
        raise ValueError(
            "recipe.training.fsdp_config.cpu_ram_efficient_loading leaves the base empty on all processes but one, and "
            "molora reads it on each before training; remove it, or use --deepspeed zero3, which loads a base in parts"
        )


def deepspeed_path(name: str) -> Path:
    """The file of a configuration that comes with molora, or the file of that path.

    Raises:
        ValueError: there is none.
    """
    path = CONFIGS.get(name, Path(name).expanduser())
    if not path.is_file():
        raise ValueError(
            f"deepspeed: {name!r} is neither a configuration that comes with molora ({', '.join(CONFIGS)}) nor a file; "
            "give one of these names, or the path of a DeepSpeed JSON"
        )
    return path


def _read_json(key: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {path} cannot be read as JSON ({error}); give another file") from error
    if not isinstance(config, dict):
        raise ValueError(f"{key}: {path} must hold a JSON object, got a {type(config).__name__}")
    return config


def engine_arguments(training: dict[str, Any]) -> dict[str, Any]:
    """What TrainingArguments gets for the engine, in the place of the recipe's own words; connects a lone process.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    deepspeed = training.get("deepspeed")
    if not deepspeed and not training.get("fsdp"):
        return {}
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is not installed; run pip install 'molora[deepspeed]'")
    if "RANK" not in os.environ:
        # Both engines want to be launched; a process without a launcher is the only one.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
    return {"deepspeed": str(deepspeed_path(deepspeed))} if isinstance(deepspeed, str) else {}


def deepspeed_config(args: Any) -> dict[str, Any]:
    """DeepSpeed's configuration of these TrainingArguments, itself, to read and to fill in; empty without one."""
    config: dict[str, Any] = getattr(getattr(args, "hf_deepspeed_config", None), "config", {})
    return config


def is_zero3(args: Any) -> bool:
    """Whether these TrainingArguments make `from_pretrained` load a base in parts."""
    config = getattr(args, "hf_deepspeed_config", None)
    return config is not None and config.is_zero3()


def partitions(args: Any) -> bool:
    """Whether the engine of these TrainingArguments gives each process a part of every parameter."""
    return is_zero3(args) or bool(args.fsdp)
