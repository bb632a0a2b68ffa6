"""The experts of a mixture as LoRA adapters again, each a directory that PEFT, vLLM and SGLang load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from molora.adapters.from_adapters import pairs_of
from molora.adapters.lora_config import CONFIG_FILE
from molora.adapters.lora_files import LoraPair, write_lora
from molora.checks import check_choice, check_number
from molora.context import adapter_of, runtime_of
from molora.ffn import MixedFFN
from molora.layers import MoloraLayer
from molora.quantization import is_quantized

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
    runtime, adapter, config = adapter_of(model, adapter_name, "to export")
    base: Any = runtime.model()
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
    base: Any = runtime_of(model).model()
    name = getattr(base, "name_or_path", None) or None
    directories = {expert: Path(out) / expert for expert in experts}
    make_way(directories.values(), overwrite)
    for expert, pairs in experts.items():
        write_lora(directories[expert], pairs, name, model=base)
    return directories


def make_way(directories: Iterable[Path], overwrite: bool) -> None:
    """Removes adapters that are to be overwritten; raises ValueError for anything else that is there."""
    taken = [d for d in directories if os.path.lexists(d) and not (d.is_dir() and not any(d.iterdir()))]
    for directory in taken:
        if not overwrite or not (directory / CONFIG_FILE).is_file():
            raise ValueError(
                f"{directory} is there already; choose another directory"
                + (", only adapters are overwritten" if overwrite else ", or overwrite adapters with overwrite=True")
            )
    for directory in taken:
        shutil.rmtree(directory)


def average_adapters(
    base: nn.Module,
    adapters: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Mapping[str, float] | None = None,
    combination: str = "linear",
    density: float = 0.2,
    overwrite: bool = False,
) -> None:
    """Merges LoRA adapters into one by PEFT's own `add_weighted_adapter`, in fp32, and writes it as a PEFT LoRA.

    Args:
        base: the causal LM of the adapters; left alone.
        adapters: name and directory of each.
        out: a directory; overwrite: whether an adapter that is there gives way.
        weights: of each adapter; None: 1 / number of adapters ("ties" and "dare_ties": 1 each).
        combination: PEFT's combination_type. "cat" is the weighted sum of the products, exactly, with the ranks added
            up; "linear" averages A and B, with cross terms; "cat" and "svd" take unequal ranks.
        density: share of values that pruning ones ("ties", "dare_...", "magnitude_prune") keep.

    Raises:
        ValueError: unknown names of adapters or of the combination, adapters that `from_adapters` refuses, or unequal
            ranks; nothing is written.
    """
    check_choice("combination", combination, COMBINATIONS)
    check_number("density", density, above=0)
    if density > 1:
        raise ValueError(f"density={density} is the share of values that are kept; give at most 1")
    names = list(adapters)
    if not names:
        raise ValueError("adapters is empty; name at least one")
    weights = weights or dict.fromkeys(names, 1.0 if "ties" in combination else 1 / len(names))
    if set(weights) != set(names):
        raise ValueError(f"weights are for {', '.join(weights)}, the adapters are {', '.join(names)}; give each one")
    for name in names:
        check_number(f"weights[{name!r}]", weights[name])
    pools = [pairs_of(base, adapters[name], False) for name in names]
    ranks = sorted({len(pair.A) for pool in pools for pair in pool.values()})
    if len(ranks) > 1 and combination not in ("cat", "svd", "ties_svd"):
        raise ValueError(
            f"combination={combination!r} needs adapters of one rank, these have {ranks}; use 'cat' or 'svd'"
        )
    model = _loras_of(pools)
    pruned = {"density": density} if combination.startswith(("ties", "dare", "magnitude")) else {}
    own = [f"merged_from_{i}" for i in range(len(names))]
    model.base_model.add_weighted_adapter(
        own, [weights[n] for n in names], "merged", combination_type=combination, **pruned
    )
    merged = {}
    for name, layer in model.base_model.model.named_modules():
        if "merged" in getattr(layer, "lora_A", ()):
            A, B = (getattr(layer, f"lora_{m}")["merged"].weight.detach() for m in "AB")
            merged[name] = LoraPair(A, B, layer.scaling["merged"])
    make_way([Path(out)], overwrite)
    write_lora(out, merged, getattr(base, "name_or_path", None) or None, model=base)


def _loras_of(pools: list[dict[str, LoraPair]]) -> Any:
    """A PeftModel of linears that take no memory, with a plain LoRA for each pool: what PEFT merges, whatever the
    configs of the adapters say and whatever dtype their base has."""
    sizes = {name: (pair.B.shape[0], pair.A.shape[1]) for pool in pools for name, pair in pool.items()}
    skeleton = nn.Module()
    for name, (outputs, inputs) in sizes.items():
        *path, leaf = name.split(".")
        parent = skeleton
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = inputs, outputs
        linear.weight = nn.Parameter(torch.zeros(()).expand(outputs, inputs), requires_grad=False)
        parent.add_module(leaf, linear)
    model: Any = None
    for i, pool in enumerate(pools):
        config = _config_of(pool)
        if model is None:
            model = get_peft_model(skeleton, config, adapter_name=f"merged_from_{i}")
        else:
            model.add_adapter(f"merged_from_{i}", config)
        _fill(model, pool, f"merged_from_{i}")
    return model


def _config_of(pairs: dict[str, LoraPair]) -> LoraConfig:
    ranks = {name: len(pair.A) for name, pair in pairs.items()}
    largest = max(ranks.values())
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(pairs),
        rank_pattern={name: r for name, r in ranks.items() if r != largest},
        alpha_pattern={name: pair.scaling * len(pair.A) for name, pair in pairs.items()},
    )


@torch.no_grad()
def _fill(model: Any, pairs: dict[str, LoraPair], adapter: str) -> None:
    for name, pair in pairs.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A[adapter].weight.copy_(pair.A)
        layer.lora_B[adapter].weight.copy_(pair.B)


def merge_into_base(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """The base with the one expert of a mixture, and its ungated LoRA, added to its weights.

    Exact up to rounding, where the mixture is one LoRA: a single expert whose gate is one for every token.

    Returns:
        The base model; `model` is used up.

    Raises:
        ValueError: gates that differ from token to token, or a quantised base.
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
    if not hasattr(model, "unload"):
        raise ValueError("merge_into_base takes a PeftModel; load the adapter with PeftModel.from_pretrained")
    if is_quantized(model):
        raise ValueError(
            "the base is quantised, and merged weights would be rounded to its few bits again; load the adapter on the "
            "base without quantisation and merge there"
        )
    experts = expert_pairs(model, adapter_name)
    base: Any = model.unload()  # type: ignore[operator]
    for pairs in experts.values():
        lora = get_peft_model(base, _config_of(pairs))
        _fill(lora, pairs, "default")
        base = lora.merge_and_unload(safe_merge=True)
    return base


def _is_constant(config: Any) -> bool:
    """Whether the gate of a single expert is one whatever the token."""
    if config.name in ("arrow", "retrieval", "centroid", "softmax"):
        return True
    return config.name == "top_k" and config.norm_topk_prob
