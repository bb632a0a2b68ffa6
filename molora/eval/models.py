"""Loads what a user names as MODEL: a base model, or a PEFT adapter on its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from molora.assets import MOLORA_TINY
from molora.checks import check_choice
from molora.eval.ranks import accelerator
from molora.eval.strict import read_yaml
from molora.quantization import QUANTIZATIONS, keep_gradients_on_cpu, quantization_config

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_base(
    model: str, *, dtype: str = "auto", quantization: str | None = None, place: bool = True
) -> PreTrainedModel:
    """Loads a base causal LM, on the accelerator if there is one.

    Args:
        model: a hub id, a local directory, or ``molora-tiny``, which travels with the package.
        dtype: one of ``DTYPES``; ``"auto"``: that of the checkpoint, or bfloat16 for a base that is quantised here.
        quantization: ``None``, or one of :data:`molora.quantization.QUANTIZATIONS`.
        place: on this process's accelerator; False: where the engine that partitions the model wants it.

    Raises:
        FileNotFoundError: ``model`` is neither a directory with a model nor a hub id that can be loaded.
        ValueError: ``model`` is an adapter, whose weights would be left out without a word; or it cannot be quantised.
    """
    named = adapter_base(model)
    if named is not None:
        raise ValueError(
            f"{model!r} is an adapter, and a new one on it would leave it out; give its base, {named!r}, or merge the "
            "adapter into its base first"
        )
    path = resolve(model)
    # Without the key, not with None: that would make transformers read a stored quantised base as if it were none.
    options: dict[str, Any] = {}
    if quantization is not None:
        dtype = "bfloat16" if dtype == "auto" else dtype
        options["quantization_config"] = quantization_config(quantization, getattr(torch, dtype))
        with _named(model):
            stored = AutoConfig.from_pretrained(path)
        if getattr(stored, "quantization_config", None) is not None:
            raise ValueError(
                f"quantization={quantization!r}: {model!r} is stored quantised already and is loaded so; leave "
                "quantization out"
            )
    device = accelerator()
    with _named(model):
        loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map={"": device} if place and (options or device.type != "cpu") else None,
            **options,
        )
    keep_gradients_on_cpu(loaded)
    return loaded


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model or of an adapter directory that has one."""
    path = resolve(model)
    with _named(model):
        return AutoTokenizer.from_pretrained(path)


@contextmanager
def _named(model: str) -> Iterator[None]:
    """What is not there is named first as the directory that the user may have meant."""
    try:
        yield
    except OSError as error:
        if Path(model).expanduser().is_dir():
            raise
        raise FileNotFoundError(
            f"no such directory {model!r}, and it cannot be loaded from the hub either: {str(error).splitlines()[0]}"
        ) from error


def resolve(model: str) -> str:
    """A local directory as an absolute path, so that an adapter can name its base from anywhere; hub ids as they are.

    Raises:
        FileNotFoundError: a path (absolute, or with a leading dot, or with a slash at its end or more than one) that is
            no directory, or a directory without a model.
    """
    path = Path(model).expanduser()
    if model == MOLORA_TINY.name and not path.exists():
        return str(MOLORA_TINY)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"directory {model!r} has no config.json and no adapter_config.json, so no model")
        return str(path.resolve())
    if path.exists():
        raise FileNotFoundError(f"{model!r} is a file; give the directory of a model, or a hub id")
    if path.is_absolute() or model.startswith((".", "~")) or model.endswith("/") or model.count("/") > 1:
        raise FileNotFoundError(f"no such directory {model!r}; give a directory with a config.json, or a hub id")
    return model


def adapter_base(model: str) -> str | None:
    """The base that an adapter directory names; ``None`` if ``model`` is not an adapter directory.

    Raises:
        ValueError: the adapter's config cannot be read or names no base.
    """
    path = Path(model).expanduser() / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not the config of an adapter ({type(error).__name__}: {error})") from error
    if not isinstance(base, str):
        raise ValueError(f"{path} names no base; write its hub id or directory under base_model_name_or_path")
    return base


def trained_quantization(model: str) -> str | None:
    """The quantisation of the base that an adapter directory was trained on, as the recipe in it says; ``None`` for
    none, and for a directory without a recipe: PEFT's own files do not hold it."""
    folder = Path(model).expanduser()
    path = folder / "recipe.yaml"
    if not path.is_file() and folder.name.startswith("checkpoint-"):
        path = folder.parent / "recipe.yaml"  # that of the run that wrote the checkpoint
    if not path.is_file():
        return None
    base = read_yaml(path).get("base")
    found = base.get("quantization") if isinstance(base, dict) else None
    return found if found in QUANTIZATIONS else None


def load_model(
    model: str, *, base: str | None = None, quantization: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads MODEL for inference, in eval mode.

    Args:
        model: an adapter directory, or a base model (hub id or directory).
        base: for an adapter, the base to use instead of the one it names.
        quantization: of the base, one of :data:`molora.quantization.QUANTIZATIONS`; ``"none"`` or ``None``: as stored.

    Raises:
        FileNotFoundError: the model, or the base that an adapter names, is not there.
        ValueError: ``base`` for a model that is no adapter, or a quantisation that there is not.
    """
    if quantization is not None:
        check_choice("--quantization", quantization, ("none", *QUANTIZATIONS))
    quantization = None if quantization == "none" else quantization
    named = adapter_base(model)
    if named is None:
        if base is not None:
            raise ValueError(f"--base is for adapter directories, and {model!r} has no adapter_config.json; remove it")
        return load_base(model, quantization=quantization).eval(), load_tokenizer(model)
    from peft import PeftModel

    base = base or named
    try:
        loaded = load_base(base, quantization=quantization)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the adapter {model!r} is for the base {base!r}, which is not here; give --base"
        ) from error
    has_tokenizer = (Path(model) / "tokenizer_config.json").is_file()
    return PeftModel.from_pretrained(loaded, model).eval(), load_tokenizer(model if has_tokenizer else base)
