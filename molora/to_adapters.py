"""The experts of a mixture as LoRA adapters again, each a directory that PEFT, vLLM and SGLang load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from molora.checks import check_choice, check_number
from molora.context import runtime_of
from molora.ffn import MixedFFN
from molora.layers import MoloraLayer
from molora.lora_config import CONFIG_FILE
from molora.lora_files import LoraPair, read_lora, write_lora

PLAIN = "plain_lora"
"""Name of the directory for the ungated LoRA beside the mixture."""
COMBINATIONS = ("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune")


def expert_pairs(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[str, LoraPair]]:
    """The LoRA of each expert by its name, and of the ungated LoRA under `PLAIN`: for each linear of the base A (r, D),
    B (O, r) and scaling, in the experts' dtype, on the CPU.

    Ranks that are zero in A and B are left out, and so are linears on which an expert has no others. Scores of a router
    are no part of an expert; one that scales its gates (rank-wise: to a mean of one) is not in the scaling either.

    Raises:
        ValueError: no such adapter, or an expert that is zero everywhere.
    """
    runtime = runtime_of(model)
    base: Any = runtime.model() or model
    live = [site.adapter for site in runtime.sites if site.live]
    adapter = adapter_name or (live[0] if live else "")
    config: Any = model.peft_config.get(adapter)  # type: ignore[union-attr, operator]
    if config is None:
        raise ValueError(f"there is no adapter {adapter!r} to export; there are {', '.join(model.peft_config)}")  # type: ignore
    experts: dict[str, dict[str, LoraPair]] = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, MoloraLayer) or adapter not in layer.molora_specs:
            continue
        for part, spec in layer.molora_specs[adapter].items():
            linear = f"{name}.{layer.structure.names[part.removeprefix('_')]}" if isinstance(layer, MixedFFN) else name
            found = layer.experts(adapter, part)
            assert found is not None
            basis = layer.molora_U[adapter]()[0] if adapter in layer.molora_U else None
            for e in range(found.num_experts):
                B = found.B[e] if basis is None else found.B[e] @ basis
                own = PLAIN if spec.router is None else _name(config, e)
                pair = _trimmed(found.A[0 if found.shares_A else e], B, found.scaling)
                if pair is not None:
                    experts.setdefault(own, {})[linear] = pair
    lost = [name for e in range(_num_experts(config)) if (name := _name(config, e)) not in experts]
    if lost:
        raise ValueError(f"expert {lost[0]!r} is zero in every linear, so there is nothing to export of it; delete it")
    return experts


def _num_experts(config: Any) -> int:
    return config.num_experts if isinstance(config.num_experts, int) else max(config.num_experts)


def _name(config: Any, e: int) -> str:
    return config.expert_names[e] if config.expert_names else f"expert_{e}"


def _trimmed(A: Tensor, B: Tensor, scaling: float) -> LoraPair | None:
    """One expert's A (R, D) and B (R, O) without the zeros that fill its rank up; None where nothing is left."""
    A, B = A.detach(), B.detach()
    ranks = (A.any(1) | B.any(1)).nonzero()
    if not len(ranks):
        return None
    r = int(ranks.max()) + 1
    return LoraPair(A[:r].cpu(), B[:r].T.contiguous().cpu(), scaling)


def to_adapters(
    model: nn.Module, out: str | os.PathLike[str], adapter_name: str | None = None, overwrite: bool = False
) -> dict[str, Path]:
    """Writes a PEFT LoRA for each expert, ``out/<expert>``, and the ungated LoRA, if there is one, ``out/plain_lora``.

    Args:
        model: a PeftModel with a mixture.
        out: a directory; what else is in it stays.
        adapter_name: the active adapter if None.
        overwrite: whether adapters of these names that are there give way.

    Returns:
        The directory of each.

    Raises:
        ValueError: no such adapter, an expert that is zero everywhere, or a directory that is taken; nothing is written
            then.
    """
    experts = expert_pairs(model, adapter_name)
    base: Any = runtime_of(model).model() or model
    name = getattr(base, "name_or_path", None) or None
    directories = {expert: Path(out) / expert for expert in experts}
    taken = [d for d in directories.values() if os.path.lexists(d) and not (d.is_dir() and not any(d.iterdir()))]
    for directory in taken:
        if not overwrite or not (directory / CONFIG_FILE).is_file():
            raise ValueError(
                f"{directory} is there already; choose another directory"
                + (", only adapters are overwritten" if overwrite else ", or overwrite adapters with overwrite=True")
            )
    for directory in taken:
        shutil.rmtree(directory)
    for expert, pairs in experts.items():
        write_lora(directories[expert], pairs, name, model=base)
    return directories


def average_adapters(
    base: nn.Module,
    adapters: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Mapping[str, float] | None = None,
    combination: str = "linear",
    density: float = 0.2,
) -> None:
    """Merges LoRA adapters into one by PEFT's own `add_weighted_adapter`, and writes it as a PEFT LoRA.

    Args:
        base: the causal LM of the adapters; left as it was.
        adapters: name and directory of each.
        weights: of each adapter; None: 1 / number of adapters ("ties" and "dare_ties": 1 each).
        combination: PEFT's combination_type. "cat" is the weighted sum of the products, exactly, with the ranks added
            up; "linear" averages A and B, with cross terms; "svd" takes unequal ranks.
        density: share of values that pruning ones ("ties", "dare_...", "magnitude_prune") keep.

    Raises:
        ValueError: unknown names of adapters or of the combination, or what PEFT refuses, for instance unequal ranks.
    """
    check_choice("combination", combination, COMBINATIONS)
    check_number("density", density, above=0)
    names = list(adapters)
    if not names:
        raise ValueError("adapters is empty; name at least one")
    weights = weights or dict.fromkeys(names, 1.0 if "ties" in combination else 1 / len(names))
    if set(weights) != set(names):
        raise ValueError(f"weights are for {', '.join(weights)}, the adapters are {', '.join(names)}; give each one")
    for name in names:
        check_number(f"weights[{name!r}]", weights[name])
        read_lora(os.fspath(adapters[name]))
    model = None
    try:
        for i, name in enumerate(names):
            # PEFT confuses adapter names that are part of module names, so they get numbers of their own.
            if model is None:
                model = PeftModel.from_pretrained(base, adapters[name], adapter_name=f"merged_from_{i}")
            else:
                model.load_adapter(os.fspath(adapters[name]), adapter_name=f"merged_from_{i}")
        assert model is not None
        pruned = {"density": density} if combination.startswith(("ties", "dare", "magnitude")) else {}
        own = [f"merged_from_{i}" for i in range(len(names))]
        model.base_model.add_weighted_adapter(
            own, [weights[n] for n in names], "default", combination_type=combination, **pruned
        )
        for name in own:
            model.delete_adapter(name)
        model.save_pretrained(os.fspath(out))
    finally:
        if model is not None:
            model.unload()


def merge_into_base(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """The base with the one expert of a mixture, and its ungated LoRA, added to its weights.

    Exact up to rounding, where the mixture is one LoRA: a single expert whose gate is one for every token.

    Returns:
        The base model; `model` is used up.

    Raises:
        ValueError: gates that differ from token to token.
    """
    runtime = runtime_of(model)
    for site in runtime.sites:
        if site.owner is None or (adapter_name is not None and site.adapter != adapter_name):
            continue
        if site.router.num_gates > 1 or not _is_constant(site.router.config):
            raise ValueError(
                f"{site.name} has {site.router.num_gates} gates that differ from token to token, so no fixed weights "
                "equal the mixture; export the experts with --to loras, or their average with --to average"
            )
    experts = expert_pairs(model, adapter_name)
    base: Any = model.unload()  # type: ignore[operator]
    for pairs in experts.values():
        ranks = {name: len(pair.A) for name, pair in pairs.items()}
        config = LoraConfig(
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            target_modules=list(pairs),
            rank_pattern=ranks,
            alpha_pattern={name: pair.scaling * len(pair.A) for name, pair in pairs.items()},
        )
        lora = get_peft_model(base, config)
        with torch.no_grad():
            for name, pair in pairs.items():
                layer: Any = lora.base_model.model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(pair.A)
                layer.lora_B["default"].weight.copy_(pair.B)
        base = lora.merge_and_unload(safe_merge=True)
    return base


def _is_constant(config: Any) -> bool:
    """Whether the gate of a single expert is one whatever the token."""
    if config.name in ("arrow", "retrieval", "centroid", "softmax"):
        return True
    return config.name == "top_k" and config.norm_topk_prob
