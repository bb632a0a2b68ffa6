"""DeepSpeed ZeRO-3: parameters lie in parts, and hooks around the call of a module put together those that it uses.

These hooks run on the host for every module, four times a step, and take longer than a GPU does for the rest. So each
decoder layer is made to gather at once all that is used inside it, and DeepSpeed's hooks inside it are taken off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from molora.layers import MoloraLayer

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Where those that gather and release are made. The second wraps functions of the first; what reduces the gradients of
# DeepSpeed's own leaf modules is of neither, and stays.
_ENGINE = ("deepspeed.runtime.zero.parameter_offload", "deepspeed.utils.nvtx")


def gather_by_block(model: nn.Module, kind: type[MoloraLayer]) -> bool:
    """Makes the blocks with layers of this kind gather for all inside them; False where ZeRO-3 does not hold the model.

    To be called before each forward: who puts hooks back (TRL does, around generation) finds them gone again.

    Source: DeepSpeed 0.19, runtime/zero/parameter_offload.py; `register_external_parameter` of its public API.
    """
    if not hasattr(model, "ds_id"):
        return False
    from deepspeed import zero

    for block in _blocks(model, kind):
        if sum([_unhook(part) for part in block.modules() if part is not block]):
            for parameter in _used_inside(block, kind):
                zero.register_external_parameter(block, parameter)
            if _keep_count not in block._forward_hooks.values():
                block.register_forward_hook(_keep_count)
    return True


def _blocks(module: nn.Module, kind: type[MoloraLayer]) -> Iterator[nn.Module]:
    """The entries of the outermost nn.ModuleLists, as decoder layers are, that hold layers of `kind`; others alone."""
    for child in module.children():
        if isinstance(child, kind):
            for read in getattr(child, "molora_reads", {}).values():
                read.apart = True  # what it gathers is for itself
        if any(isinstance(part, kind) for part in child.modules()):
            yield from [child] if isinstance(module, nn.ModuleList) or isinstance(child, kind) else _blocks(child, kind)


def _keep_count(block: nn.Module, args: Any, output: Any) -> None:
    """Gives each backward its own count of inputs to wait for before the block lets go of its weights: DeepSpeed sets
    the count anew in every forward, so that one forward between another and its backward kept all blocks together."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if isinstance(first, Tensor) and first.requires_grad:
        waits_for = getattr(block, "ds_grads_remaining", 0)
        first.register_hook(lambda _: setattr(block, "ds_grads_remaining", waits_for))


def _used_inside(block: nn.Module, kind: type[MoloraLayer]) -> Iterator[nn.Parameter]:
    yield from block.parameters()
    for layer in block.modules():
        if isinstance(layer, kind):
            for shared in layer.molora_shared.values():
                if shared.owner is not None:  # may lie in another block
                    yield from shared.owner.molora_router.parameters()


def _unhook(module: nn.Module) -> bool:
    """Takes ZeRO's hooks off a module; whether there were any."""
    found = False
    for hooks in [h for kind in _HOOKS if (h := getattr(module, kind))]:  # of most modules, before most forwards: none
        for number in [n for n, hook in hooks.items() if (hook.__module__ or "").startswith(_ENGINE)]:
            del hooks[number]
            found = True
    return found


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its forward."""
    return nn.modules.module._has_any_global_hook() or any(getattr(module, kind) for kind in _HOOKS)
