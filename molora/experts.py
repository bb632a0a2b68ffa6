"""The stacked parameters of LoRA experts: shapes and initial values.

A is (E, R, D), or (1, R, D) where experts share it, and B is (E, R, O): both flatten to (E*R, .) without a copy, rank
j is row j of both, and expert e is a PEFT LoRA's ``lora_A.weight`` (A[e]) and ``lora_B.weight`` (B[e] transposed).
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor, nn


class StackedWeight(nn.Module):
    """One parameter in a module of its own, which returns it when called.

    A module, so that what hooks modules finds it (accelerate's offload, DeepSpeed ZeRO-3), and flat, so that its key
    ends in ``<container>.<adapter>.weight`` and survives PEFT's handling of adapter names.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))

    def forward(self) -> Tensor:
        return self.weight


def lazy_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the default device; those of a CPU take no memory before something is written to them."""
    if torch.get_default_device().type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(*shape, dtype=dtype)
    count = math.prod(shape) * dtype.itemsize
    # Not numpy's zeros: it asks for huge pages, of which one value makes the whole resident.
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8, count=count).view(dtype).view(shape)


def make_experts(
    num_experts: int, r: int, in_features: int, out_features: int, share_A: bool, init: bool | str
) -> tuple[StackedWeight, StackedWeight]:
    """New A and B on the default device and dtype.

    Args:
        init: True: A uniform in ±1/sqrt(D) (PEFT's kaiming with a = sqrt(5)), B zero; "gaussian": A normal with
            standard deviation 1/r, B zero; "orthogonal": see `molora.init_experts`; False: A as with True, B uniform in
            ±1/sqrt(R); "imported": both zero, at no cost, to be replaced by weights that exist; anything else: as True,
            until what it names is called.
    """
    A = StackedWeight(1 if share_A else num_experts, r, in_features)
    B = StackedWeight(num_experts, r, out_features)
    if init == "imported":
        A.weight, B.weight = (nn.Parameter(lazy_zeros(*m.weight.shape, dtype=m.weight.dtype)) for m in (A, B))
        return A, B
    if init == "orthogonal":
        from molora.init_experts import orthogonal

        values = orthogonal(num_experts, r, in_features, out_features)
        with torch.no_grad():
            for weight, value in zip((A.weight, B.weight), values, strict=True):
                weight.copy_(value)
        return A, B
    if init == "gaussian":
        nn.init.normal_(A.weight, std=1 / r)
    else:
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(A.weight, -bound, bound)
    if init is False:
        nn.init.uniform_(B.weight, -1 / math.sqrt(r), 1 / math.sqrt(r))
    else:
        nn.init.zeros_(B.weight)
    return A, B


def scaling_factor(alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised scaling."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r
