"""Centroid routing by the running text: prompt and answer so far, embedded anew while `generate` runs (LoRA-TLE)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from molora.context import Runtime
from molora.record import ForwardInputs
from molora.routers import Centroid

NAME = "running text"
"""What reports call the one router that reads it."""


@lru_cache(maxsize=1)
def load_embedder(name: str) -> Any:
    """The sentence-transformers model of this name or directory.

    Raises:
        ValueError: the package is not installed, or there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"embedder={name!r} needs the package sentence-transformers; pip install sentence-transformers, or use "
            "embedder='base'"
        ) from None
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"embedder={name!r} could not be loaded ({error}); give a hub id or a directory") from None


def embedding_size(name: str) -> int:
    """D', the size of an embedder's vectors."""
    return int(embed(name, ["a"]).shape[1])


def embed(name: str, texts: Sequence[str]) -> Tensor:
    """Embeddings of whole texts, (N, D') fp32 on the CPU."""
    with torch.no_grad():
        return load_embedder(name).encode(list(texts), convert_to_tensor=True, show_progress_bar=False).float().cpu()


def centroid_of(runtime: Runtime) -> Centroid | None:
    """The config of the router that reads running text, if there is one."""
    configs = (site.router.config for site in runtime.sites if site.live)
    return next((c for c in configs if isinstance(c, Centroid) and c.reads_text), None)


# Decoding that shows the model pieces of text, or candidates that may be taken back.
_OTHER_DECODING = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")


def check_decoding(config: Centroid, model: Any, options: Mapping[str, Any]) -> None:
    """Refuses ways to decode that do not show the running text step by step."""
    stored = options.get("generation_config") or getattr(model, "generation_config", None)
    for key in _OTHER_DECODING:
        if options.get(key, getattr(stored, key, None)) is not None:
            raise ValueError(
                f"embedder={config.embedder!r} reads the running text token by token, which {key} does not show; leave "
                f"{key} out, or use embedder='base'"
            )


@contextlib.contextmanager
def reading(model: nn.Module, runtime: Runtime, config: Centroid, tokenizer: Any) -> Iterator[None]:
    """Embeds the running text before each step of the `generate` inside, every `reweight_every` tokens.

    `prepare_inputs_for_generation` gets the whole text of every row at each step, after beams were reordered.
    """
    if tokenizer is None:
        raise ValueError(
            f"embedder={config.embedder!r} reads the running text, which needs the tokenizer; call "
            "generate(..., tokenizer=tokenizer), or use embedder='base'"
        )
    prepare: Any = model.prepare_inputs_for_generation
    steps, embedding = 0, torch.empty(0)

    def prepared(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps, embedding
        if steps % config.reweight_every == 0 or len(embedding) != len(input_ids):
            texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            embedding = embed(config.embedder, texts).to(input_ids.device)
        steps += 1
        runtime.inputs = ForwardInputs(embeddings={NAME: embedding})
        return prepare(input_ids, *args, **kwargs)

    model.prepare_inputs_for_generation = prepared  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation
        runtime.inputs = ForwardInputs()
