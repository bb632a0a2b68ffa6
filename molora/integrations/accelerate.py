"""accelerate: FSDP on processes without a GPU."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def use_fsdp_without_gpu(accelerator: Any, options: dict[str, Any]) -> None:
    """Makes an Accelerator use FSDP on CPUs, where it would go on under DDP without a word.

    Args:
        accelerator: of CPU processes.
        options: of accelerate's FullyShardedDataParallelPlugin.
    """
    plugin = FullyShardedDataParallelPlugin(**options)
    if accelerator.state.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.state.mixed_precision)
    # A state that is made later copies the type from the other one.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
