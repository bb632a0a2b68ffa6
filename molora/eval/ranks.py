"""Several processes: who writes and speaks, who scores which rows, and models that are spread over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """Processes of this run, as their launcher says (torchrun, deepspeed, accelerate launch); 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def connected_ranks() -> int:
    """Processes that can send each other tensors; 1 before a trainer has connected them."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if connected_ranks() > 1:
        torch.distributed.barrier()


def is_partitioned(model: nn.Module) -> bool:
    """Whether each process holds a part of every parameter (ZeRO-3, FSDP2), so that all must run the same forwards."""
    return connected_ranks() > 1 and any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


def device_of(model: Any) -> torch.device:
    """Where a model computes; the parameters of one that is partitioned may wait elsewhere."""
    return accelerator() if any(hasattr(p, "ds_id") for p in model.parameters()) else model.device


def accelerator() -> torch.device:
    """The accelerator of this process among those of its machine; the CPU without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return (
        torch.device("cpu") if device is None else torch.device(device.type, torch.accelerator.current_device_index())
    )


def own_share(items: Sequence[Any]) -> list[Any]:
    """Every n-th of the items, beginning with this process's number; the last come again, so that all have as many."""
    if connected_ranks() == 1:
        return list(items)
    rank, ranks = torch.distributed.get_rank(), connected_ranks()
    rounds = -(-len(items) // ranks)
    return [items[min(turn * ranks + rank, len(items) - 1)] for turn in range(rounds)]


def gathered(own: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    if connected_ranks() == 1:
        return own
    lists: list[Any] = [None] * connected_ranks()
    torch.distributed.all_gather_object(lists, own)
    return [item for part in lists for item in part]
