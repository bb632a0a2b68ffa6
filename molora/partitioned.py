"""DeepSpeed ZeRO-3: parameters lie in parts, and hooks around the call of a module put together those that it uses.

These hooks cost the host more than a mixture needs for the rest of its work. So a mixture layer is made to gather what
all of its parts use when it is called itself, and runs those parts without hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from molora.layers import MoloraLayer


def gather_with_layers(model: nn.Module, kind: type[MoloraLayer]) -> bool:
    """Makes the layers of this kind gather for all of their parts; False where ZeRO-3 has no hooks on the model."""
    if not hasattr(model, "ds_id"):
        return False
    from deepspeed import zero

    for layer in model.modules():
        if isinstance(layer, kind):
            for parameter in layer.parameters_to_gather():
                zero.register_external_parameter(layer, parameter)
            layer.molora_gathers = True
    return True


def is_hooked(module: nn.Module, gathered: bool = False) -> bool:
    """Whether a call of `module` does more than its forward.

    Args:
        gathered: whether its parameters are together anyway, so that DeepSpeed's hooks do not count.
    """
    if nn.modules.module._has_any_global_hook():
        return True
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        for hook in hooks.values():
            if not (gathered and hook.__module__.startswith("deepspeed.")):
                return True
    return False
