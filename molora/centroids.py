"""Centroids from example prompts: what each expert's texts look like to the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.checks import check_int
from molora.config import MoloraConfig
from molora.context import Runtime, adapter_of
from molora.layers import MoloraLayer
from molora.record import ForwardInputs, in_backward
from molora.routers import Centroid, Retrieval
from molora.routers.fixed_vectors import FixedVectorRouter
from molora.running_text import embed


@dataclass
class ReadQuery:
    """A forward pre-hook of a decoder layer that makes its input the query of the router of this name."""

    runtime: Runtime
    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not in_backward():  # a recomputation finds that of its forward
            self.runtime.inputs.embeddings[self.name] = hidden_of(args, kwargs).detach().flatten(0, -2)


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a module's arguments: the first one."""
    value: Tensor = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
    return value


@torch.no_grad()
def set_centroids(
    model: nn.Module,
    examples: Mapping[str, Sequence[str]],
    tokenizer: Any,
    adapter_name: str | None = None,
    max_length: int = 512,
) -> None:
    """Sets the centroids of a centroid or retrieval router from example prompts: one list of texts for each expert.

    A centroid is the mean over texts of a text's embedding: the mean over tokens of the hidden state that the router
    reads, of the base without adapters; or the vector of the sentence-transformers embedder.

    Args:
        model: a PeftModel, or a transformers model with an adapter of its own.
        tokenizer: of the base.
        adapter_name: the active adapter if None.
        max_length: tokens of a text that are read.

    Raises:
        ValueError: another router, or not one list of texts for each expert.
    """
    runtime, adapter, config = adapter_of(model, adapter_name, "to set centroids of")
    base: Any = runtime.model()
    router = config.router
    if not getattr(router, "has_centroids", False):
        name = getattr(router, "name", router)
        raise ValueError(f"router {name!r} has no centroids; they belong to routers 'centroid' and 'retrieval'")
    sites = [site for site in runtime.sites if site.adapter == adapter and site.owner is not None]
    names = _checked_names(examples, config, sites[0].router)
    vectors = example_vectors(base, runtime, adapter, router, {n: examples[n] for n in names}, tokenizer, max_length)
    for site in sites:
        assert isinstance(site.router, FixedVectorRouter)
        site.router.set_vectors(vectors[site.name])
    config.expert_names = names


def example_vectors(
    base: nn.Module,
    runtime: Runtime,
    adapter: str,
    router: Centroid | Retrieval,
    examples: Mapping[str, Sequence[str]],
    tokenizer: Any,
    max_length: int = 512,
) -> dict[str, Tensor]:
    """For each router of the adapter, by name, one vector for each entry of `examples`: (n, D')."""
    check_int("max_length", max_length)
    sites = [site for site in runtime.sites if site.adapter == adapter and site.owner is not None]
    if router.reads_text:
        means = torch.stack([embed(router.embedder, texts).double().mean(0) for texts in examples.values()])
        return {site.name: means for site in sites}
    sources = {s.name: base.get_submodule(s.name) if router.reads_embedding else s.owner for s in sites}
    rows = [_mean_inputs(base, runtime, sources, texts, tokenizer, max_length) for texts in examples.values()]
    return {site.name: torch.stack([row[site.name] for row in rows]) for site in sites}


def _checked_names(examples: Any, config: MoloraConfig, router: Any) -> list[str]:
    """The experts' names; the examples must be a list of texts for each."""
    if not isinstance(examples, Mapping):
        raise ValueError("examples must map each expert's name to a list of texts")
    for name, texts in examples.items():
        check_texts(name, texts)
    names, num_experts = list(examples), config.num_experts
    if len(names) != num_experts or not all(len(texts) for texts in examples.values()):
        raise ValueError(
            f"examples has {len(names)} sets of prompts ({', '.join(names)}) for num_experts={num_experts}; give each "
            "expert one set that is not empty"
        )
    if config.expert_names is not None and sorted(names) == sorted(config.expert_names):
        return list(config.expert_names)
    # Names from an earlier call give way; names from the config do not.
    fixed = config.init_lora_weights == "imported" or not router.vectors.any()
    if config.expert_names is not None and names != list(config.expert_names) and fixed:
        raise ValueError(f"examples are for {names}, the experts are {config.expert_names}; give these, in their order")
    return names


def check_texts(name: str, texts: Any) -> None:
    """Raises ValueError for example prompts that are no list of texts."""
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_list or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"examples[{name!r}] must be a list of texts that are not empty")


def _mean_inputs(
    model: nn.Module,
    runtime: Runtime,
    sources: Mapping[str, nn.Module],
    texts: Sequence[str],
    tokenizer: Any,
    max_length: int,
) -> dict[str, Tensor]:
    """For each module the mean over texts of the mean over tokens of its input, by the base without adapters."""
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device

    def add(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mean = hidden_of(args, kwargs).double().flatten(0, -2).mean(0)
        sums[name] = sums[name] + mean if name in sums else mean

    def hook(name: str) -> Any:
        return lambda module, args, kwargs: add(name, args, kwargs)

    handles = [module.register_forward_pre_hook(hook(n), with_kwargs=True) for n, module in sources.items()]
    try:
        with base_alone(model):
            for text in texts:
                ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)["input_ids"]
                if not ids.shape[1]:
                    raise ValueError(f"the example prompt {text!r} has no tokens; leave it out")
                model(input_ids=ids.to(device), use_cache=False)
    finally:
        runtime.inputs = ForwardInputs()
        for handle in handles:
            handle.remove()
    return {name: total / len(texts) for name, total in sums.items()}


@contextlib.contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """The model without adapters and in eval mode."""
    layers = [module for module in model.modules() if isinstance(module, MoloraLayer)]
    before, training = [layer._disable_adapters for layer in layers], model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        model.train(training)
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
