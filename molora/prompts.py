"""Prompts of a retrieval router: each is embedded once, and its choice of experts holds for the whole answer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from molora.centroids import base_alone, hidden_of
from molora.context import Runtime
from molora.record import ForwardInputs
from molora.routers import Retrieval
from molora.running_text import embed


def retrieval_site(runtime: Runtime) -> tuple[str, Retrieval] | None:
    """(name, config) of the router that reads prompts, if there is one."""
    sites = ((site.name, site.router.config) for site in runtime.sites if site.live)
    return next(((name, config) for name, config in sites if isinstance(config, Retrieval)), None)


@torch.no_grad()
def embed_prompts(
    model: nn.Module,
    layer: str,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> Tensor:
    """The mean over each row's tokens of the hidden states that enter `layer`, by the base without adapters: (N, D)
    fp64.

    Args:
        input_ids: (N, length).
        attention_mask: (N, length) with 0 for padding; None: no padding.
        inputs_embeds: (N, length, D), instead of ids.
    """
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda module, args, kwargs: found.append(hidden_of(args, kwargs).double()), with_kwargs=True
    )
    try:
        with base_alone(model):
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
            if attention_mask is not None and "position_ids" in inspect.signature(model.forward).parameters:
                # As `generate` has them, so that padding moves no token.
                given["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            model(**{k: v for k, v in given.items() if v is not None}, use_cache=False)
    finally:
        handle.remove()
    hidden = found[0]
    if attention_mask is None:
        return hidden.mean(1)
    weight = attention_mask.to(hidden).unsqueeze(2)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def embed_texts(config: Retrieval, input_ids: Tensor | None, attention_mask: Tensor | None, tokenizer: Any) -> Tensor:
    """The vectors of the prompts as texts, by the sentence-transformers embedder of the router: (N, D') fp32.

    Args: as for `prompts`.

    Raises:
        ValueError: no tokenizer, or no ids.
    """
    if tokenizer is None or input_ids is None:
        raise ValueError(
            f"embedder={config.embedder!r} reads the prompt as text, which needs its ids and the tokenizer; call "
            "generate(..., tokenizer=tokenizer), or use embedder='base'"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
    return embed(config.embedder, tokenizer.batch_decode(rows, skip_special_tokens=True)).to(input_ids.device)


@contextlib.contextmanager
def prompts(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    inputs_embeds: Tensor | None = None,
) -> Iterator[None]:
    """The forwards and `generate` inside answer these prompts: their rows go to the experts retrieved for them.

    Args:
        model: with a retrieval router; any other model runs as it is.
        input_ids: (N, length), the prompts, without the answers; a forward inside has N rows, or a multiple of N
            (beams), those of one prompt next to each other.
        attention_mask: (N, length) with 0 for padding.
        tokenizer: for an embedder that reads text.

    Raises:
        ValueError: an embedder that reads text without a tokenizer or without ids.
    """
    runtimes = (getattr(module, "__dict__", {}).get("molora_runtime") for module in model.modules())
    runtime = next((r for r in runtimes if isinstance(r, Runtime)), None)
    found = None if runtime is None else retrieval_site(runtime)
    if runtime is None or found is None:
        yield
        return
    name, config = found
    if config.reads_text:
        vectors = embed_texts(config, input_ids, attention_mask, tokenizer)
    else:
        vectors = embed_prompts(_base(model, runtime), name, input_ids, attention_mask, inputs_embeds)
        runtime.inputs = ForwardInputs()
    before, runtime.standing = runtime.standing, {name: vectors}
    try:
        yield
    finally:
        runtime.standing = before
        runtime.inputs = ForwardInputs()  # a forward that failed has left the prompts there


def _base(model: nn.Module, runtime: Runtime) -> nn.Module:
    return runtime.model() or model
