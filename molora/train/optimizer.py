"""The recipe's optimizer section: LoRA+, and what of the section belongs into the adapter's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from molora.checks import check_choice, check_number


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How the experts learn, beside what ``training`` says (``optim``, ``learning_rate``, ...)."""

    loraplus_lr_ratio: float | None = None
    """B learns at this many times the learning rate (LoRA+, arXiv 2402.12354), at least 1; ``None``: at the same."""
    riemannian: bool | str = False
    """Of a mixture: as in MoloraConfig; true or ``gate_rescaled``."""

    def __post_init__(self) -> None:
        if self.loraplus_lr_ratio is not None:
            check_number("optimizer.loraplus_lr_ratio", self.loraplus_lr_ratio, at_least=1)
        check_choice("optimizer.riemannian", self.riemannian, (True, False, "gate_rescaled"))


def loraplus_optimizer(
    model: PeftModel, optimizer_cls: Any, options: dict[str, Any], ratio: float, weight_decay: float
) -> torch.optim.Optimizer:
    """PEFT's LoRA+ optimizer: B, and parameters of one dimension, at ``ratio`` times the learning rate.

    PEFT finds B by "lora_B" in its name, which molora's "molora_B" contains. Deviation: the biases, thresholds and
    temperatures of routers, which PEFT would count to B for their one dimension, learn at the plain rate as the rest of
    a router does.

    Args:
        model: with its adapter.
        optimizer_cls: a class that takes parameter groups.
        options: its other arguments, with ``lr``.
        ratio: >= 1.
        weight_decay: of all but parameters of one dimension.

    Raises:
        ValueError: an optimizer that is not made from parameter groups.
    """
    for key in ("params", "model", "optimizer_dict"):
        if key in options or not isinstance(optimizer_cls, type):
            raise ValueError(
                "optimizer.loraplus_lr_ratio needs an optimizer that takes parameter groups, which this "
                "recipe.training.optim does not; set it to 'adamw_torch', or loraplus_lr_ratio to null"
            )
    made: torch.optim.Optimizer = create_loraplus_optimizer(
        model, optimizer_cls, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay, **options
    )
    routers = {p for name, p in model.named_parameters() if ".molora_router." in name}
    plain, *others = made.param_groups
    moved = [p for group in others for p in group["params"] if p in routers]
    for group in others:
        group["params"] = [p for p in group["params"] if p not in routers]
    # DeepSpeed cannot flatten a group of nothing.
    groups = [plain, *others, {**plain, "weight_decay": 0.0, "params": moved}]
    made.param_groups = [group for group in groups if group["params"]]
    return made
