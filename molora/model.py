"""MoloraModel: the PEFT tuner. Finds the modules a config names, replaces them, and says clearly when it cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from molora.aux_loss import observe_output
from molora.centroids import ReadQuery, set_centroids
from molora.config import MoloraConfig
from molora.context import Runtime, aux_weight
from molora.ffn import MixedFFN
from molora.kernels import selection
from molora.layers import NOT_MERGEABLE, MoloraLayer
from molora.linear import MixedLinear
from molora.loading import base_fingerprint, check_state_dict, verify_loaded
from molora.partitioned import gather_by_block
from molora.plan import FFNPlan, LinearPlan, plan_conversion
from molora.prompts import prompts, retrieval_site
from molora.prototypes import set_prototypes
from molora.routers import Centroid
from molora.running_text import centroid_of, check_decoding, reading
from molora.shared import SharedRead, SharedRouting


class MoloraModel(BaseTuner):
    """Injects mixtures of LoRA experts into a causal LM; made by `get_peft_model`, not by hand.

    Args: as `peft.tuners.tuners_utils.BaseTuner`.

    Raises:
        ValueError: a target that matches nothing, an FFN of unknown shape, a base that is itself a mixture of experts,
            a numeric adapter name. Nothing is replaced then.
    """

    prefix = "molora_"
    tuner_layer_cls = MoloraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not adapter_name or "." in adapter_name:
            raise ValueError(
                f"adapter name {adapter_name!r} must be a word without dots; it is part of parameter names"
            )
        if adapter_name.isdigit():
            raise ValueError(
                f"adapter name {adapter_name!r} is a number, which PEFT confuses with the numbers of layers when it "
                "saves; use a word"
            )
        config: MoloraConfig = self.peft_config[adapter_name]
        self._plan = plan_conversion(model, config)
        self._shared = {entry.block: SharedRouting() for entry in self._plan.values() if entry.block}
        self._reads = {entry.reads: SharedRead() for entry in self._plan.values() if isinstance(entry, LinearPlan)}
        runtime = model.__dict__.get("molora_runtime")
        fresh = runtime is None
        self._runtime: Runtime = runtime or Runtime()
        if fresh:
            self._runtime.install(model, observe_output, verify_loaded, partial(gather_by_block, kind=MoloraLayer))
        targets, excluded = config.target_modules, config.exclude_modules
        config.exclude_modules = None  # the plan has left them out; PEFT would warn that it found none to exclude
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            if fresh:
                self._runtime.remove(model)
            raise
        finally:
            config.target_modules = targets  # PEFT writes every linear's name over "all-linear"
            config.exclude_modules = excluded
        self._runtime.shared.extend([*self._shared.values(), *self._reads.values()])
        if isinstance(config.router, Centroid) and config.router.layer is not None:
            name = next(e.place.name for e in self._plan.values() if e.block)
            layer = model.get_submodule(name)
            hook = ReadQuery(self._runtime, name)
            self._runtime.add_hook(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if config.inference_mode or config.base_fingerprint:
            self._runtime.unverified.add(adapter_name)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key in self._plan

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # PEFT cuts the mark of a compiled model off the names it reads from a state dict.
        found = self._plan.get(current_key) or self._plan.get(f"_orig_mod.{current_key}")
        if found is None:
            raise ValueError(f"the state dict has tensors for {current_key}, which this config does not convert")
        entry: LinearPlan | FFNPlan = found
        inference_mode = peft_config.inference_mode
        layer = target
        if isinstance(entry, FFNPlan):
            if not isinstance(layer, MixedFFN):
                layer = MixedFFN(target, entry.structure, self._runtime)
            shared = self._shared[entry.block] if entry.block else None
            layer.update_layer(adapter_name, entry.specs, entry.place, shared, entry.by_projection, inference_mode)
        else:
            if not isinstance(layer, MixedLinear):
                layer = MixedLinear(target, self._runtime)
            shared = self._shared[entry.block] if entry.block else None
            layer.update_layer(adapter_name, entry.spec, entry.place, shared, self._reads[entry.reads], inference_mode)
        if layer is not target:
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # our layers place their own parameters; an FFN has no `weight` to copy

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # New adapters are fp32, as PEFT makes them by default; only autocast_adapter_dtype=False rounds them.
        if not autocast_adapter_dtype:
            for module in self.modules():
                if isinstance(module, MoloraLayer):
                    module.to_base_dtype(adapter_name)

    def _add_modules_to_save_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        # PEFT trains the input embedding and ties the rest to it (peft.utils.other.set_additional_trainable_modules).
        embedding = self.model.get_input_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is embedding)
        tied = {name, *tied_weight_keys}
        own = [m for m in peft_config.modules_to_save if not any(t == m or t.endswith(f".{m}") for t in tied)]
        peft_config.modules_to_save = [*own, name]
        peft_config.modules_to_tie = set(tied_weight_keys)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._runtime.unverified.discard(adapter_name)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        raise NotImplementedError(NOT_MERGEABLE)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "mixtures cannot be averaged: the experts of one have nothing to do with those of another, nor have the "
            "routers"
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT enters this around each forward and then drops the argument.
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: molora runs one mixture for a whole batch; choose it with set_adapter()")
        yield

    def unload(self) -> torch.nn.Module:
        base = super().unload()
        self._runtime.remove(base)
        return base

    @contextlib.contextmanager
    def aux_weight(self, weight: float) -> Iterator[None]:
        """`molora.context.aux_weight` of this model."""
        with aux_weight(self, weight):
            yield

    def set_kernel(self, name: str | None) -> None:
        """Chooses the kernel of this model's mixtures: "reference", "dense_masked", or None for the default."""
        selection.check(name)
        self._runtime.kernel = name

    def add_expert(self, name: str, path: str | os.PathLike[str], **options: Any) -> None:
        """`molora.add_expert` of this model."""
        from molora.adapters.expert_pool import add_expert

        add_expert(self, name, path, **options)

    def delete_expert(self, name: str, **options: Any) -> None:
        """`molora.delete_expert` of this model."""
        from molora.adapters.expert_pool import delete_expert

        delete_expert(self, name, **options)

    def set_prototypes(self, **options: Any) -> None:
        """`molora.set_prototypes` of this model."""
        set_prototypes(self, **options)

    def prompts(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """`molora.prompts.prompts` of this model."""
        return prompts(self, *args, **kwargs)

    def set_centroids(
        self,
        examples: Mapping[str, Sequence[str]],
        tokenizer: Any,
        adapter_name: str | None = None,
        max_length: int = 512,
    ) -> None:
        """`molora.set_centroids` of this model."""
        set_centroids(self, examples, tokenizer, adapter_name, max_length)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`; a retrieval router reads the prompt first, a centroid router with a
        sentence-transformers embedder reads along."""
        config = centroid_of(self._runtime)
        if config is None and retrieval_site(self._runtime) is not None and not self._runtime.standing:
            ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            given = (ids, kwargs.get("attention_mask"), kwargs.get("tokenizer"), kwargs.get("inputs_embeds"))
            with prompts(self, *given):
                return self.model.generate(*args, **kwargs)
        if config is None:
            return self.model.generate(*args, **kwargs)
        check_decoding(config, self.model, kwargs)
        with reading(self.model, self._runtime, config, kwargs.get("tokenizer")):
            return self.model.generate(*args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        assert isinstance(config, MoloraConfig)
        config.base_fingerprint = base_fingerprint(model)
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, config, adapter_name, remapped)
        return remapped
