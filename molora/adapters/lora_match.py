"""Which modules of a base model the pairs of a LoRA file belong to."""

from __future__ import annotations

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.adapters.lora_config import refuse, short
from molora.adapters.lora_files import LoraFile, LoraPair
from molora.layers import linear_features
from molora.suggest import nearest

# What PEFT puts a LoRA on; it refuses to convert anything else that its names select.
_CONVERTIBLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def match_lora(lora: LoraFile, model: nn.Module, allow_partial: bool = False) -> tuple[dict[str, LoraPair], list[str]]:
    """Finds the module of each pair, and the modules that should have a pair and have none.

    A base of another name is no error, because people rename folders; other names or sizes of modules are.

    Args:
        model: the base model, or one that carries adapters already; dtype and device do not matter.
        allow_partial: whether modules that the config's target_modules select may lack weights. PEFT leaves such
            modules as they are, since a new B is zero.

    Returns:
        The pairs by the full name of the module in the base, in the base's order; and the names of the modules that
        the config selects but the file has no weights for, empty unless allow_partial.

    Raises:
        ValueError: a module that the base lacks, that is no linear, that has other sizes, or that the config does not
            select; and without allow_partial, a selected module without weights.
    """
    modules = base_modules(model)
    for name, pair in lora.pairs.items():
        if name not in modules:
            raise refuse(
                lora.path,
                f"it has weights for {short(name)}, which this base lacks; {nearest(name, modules)}it belongs to "
                f"another base ({lora.base or 'unnamed'}), load that one",
            )
        features, want = linear_features(modules[name]), (pair.A.shape[1], pair.B.shape[0])
        if features is None:
            raise refuse(
                lora.path,
                f"{name} is of type {type(modules[name]).__name__} in this base, and experts sit on linears only; it "
                "belongs to another base",
            )
        if features != want:
            raise refuse(
                lora.path,
                f"{name} takes {want[0]} features and gives {want[1]} there, {features[0]} and {features[1]} in this "
                f"base; it belongs to another base ({lora.base or 'unnamed'}), load that one",
            )
    selected = _selected(lora, model, modules)
    ignored = [name for name in lora.pairs if name not in selected]
    if ignored:
        raise refuse(
            lora.path,
            f"it has weights for {len(ignored)} modules that its config does not select, first {ignored[0]}, and PEFT "
            "would ignore them; correct target_modules or save it again",
        )
    missing = [name for name in modules if name in selected and name not in lora.pairs]
    if missing and not allow_partial:
        raise refuse(
            lora.path,
            f"its config selects {len(selected)} modules of this base, and {len(missing)} of them have no weights, "
            f"first {missing[0]}; if they are to stay as the base has them, pass allow_partial=True (--allow-partial)",
        )
    return {name: lora.pairs[name] for name in modules if name in lora.pairs}, missing


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base by their names in it, as if no adapter were there."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, name: str) -> None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        if name:
            found[name] = module
        inside = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for child, grandchild in inside.named_children():
            walk(grandchild, f"{name}.{child}" if name else child)

    walk(model.get_base_model() if isinstance(model, PeftModel) else model, "")
    return found


def _selected(lora: LoraFile, model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The modules that PEFT would put this LoRA on."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    config = LoraConfig(**{key: lora.config.get(key) for key in keys})
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        config.target_modules = {n for n, m in modules.items() if linear_features(m) is not None and m is not head}
    layers = {name: module for name, module in modules.items() if _convertible(module)}
    return {name for name in layers if check_target_module_exists(config, name)}


def _convertible(module: nn.Module) -> bool:
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return isinstance(module, _CONVERTIBLE)
