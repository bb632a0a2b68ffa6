"""Adapter: the sorted mixture of a linear by MegaBlocks, its routing kernels and its grouped GEMM.

`megablocks.ops` sorts, counts, gathers and scatters; `grouped_gemm` multiplies, as in MegaBlocks' own "grouped" MLP.
The block-sparse MLP is no part of this: stk asks for blocks of 128 columns, more than the rank of an expert, and
MegaBlocks refuses it from Triton 3.2 on. docs/kernels.md says how to install both packages beside a current torch.

grouped_gemm comes in two builds of one name. The default one calls cuBLAS once per expert and wants the group sizes on
the CPU: one host sync per forward, and no CUDA graph. Built with GROUPED_GEMM_CUTLASS=1 the sizes stay on the GPU, for
at most 512 experts. Which one is installed shows only when it is called; both compute in bf16 alone.

Legend: T tokens, D input features, O output features, E experts, K top-k, R rank of one expert, N = T*K routed rows.

plan     shape  dtype  meaning
order    (N,)   int64  place among the rows sorted by expert -> flat (t, k) of `topk_ids`
sizes    (E,)   int64  rows of an expert; on the CPU for the cuBLAS build
indices  (N,)   int32  `order`, as MegaBlocks wants it
bin_ids  (N,)   int32  expert of a sorted row
bins     (E,)   int32  where the rows of an expert end
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from molora.kernels import grouped_gemms
from molora.kernels.grouped_gemms import Plan, Primitives
from molora.kernels.reference import Projection

MAX_EXPERTS = 512
"""Of the CUTLASS build: one thread block prepares all groups. Source: grouped_gemm, csrc/fill_arguments.cuh."""

MAX_ELEMENTS = 2**31
"""Of a gathered matrix: both packages compute offsets in int32, and a larger one would wrap around silently."""


@functools.cache
def sizes_stay_on_gpu(device: torch.device) -> bool:
    """Whether the installed grouped_gemm takes group sizes on the GPU (CUTLASS build) or only on the CPU (cuBLAS)."""
    from grouped_gemm import backend

    one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        backend.gmm(one, one[None], torch.tensor([8], device=device))
    except RuntimeError as error:
        if "is_cpu" not in str(error):
            raise
        return False
    return True


def _sort(topk_ids: Tensor, num_experts: int) -> Plan:
    from megablocks import ops

    ids = topk_ids.flatten().int()
    # The radix sort looks at the bits that an id can have, and no more.
    bin_ids, indices = ops.sort(ids, max(1, (num_experts - 1).bit_length()))
    counts = ops.histogram(ids, num_experts)
    bins = ops.inclusive_cumsum(counts, 0).view(num_experts)  # a single expert comes back without a dimension
    sizes = counts.long()
    if not sizes_stay_on_gpu(ids.device):
        sizes = sizes.cpu()  # the host sync of the cuBLAS build
    return indices.long(), sizes, indices, bin_ids, bins


def _gather(tokens: Tensor, plan: Plan, top_k: int) -> Tensor:
    from megablocks import ops

    rows: Tensor = ops.gather(tokens.contiguous(), *plan[2:], top_k)
    return rows


def _combine(rows: Tensor, plan: Plan, top_k: int) -> Tensor:
    from megablocks import ops

    _, _, indices, bin_ids, bins = plan
    tokens: Tensor = ops.scatter(rows, indices, bin_ids, None, bins, top_k)
    return tokens


def _gemm(a: Tensor, b: Tensor, plan: Plan, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    # Not grouped_gemm.ops.gmm: that one is for autograd and has no trans_a.
    from grouped_gemm import backend

    product: Tensor = backend.gmm(a, b, plan[1], trans_a, trans_b)
    return product


PRIMITIVES = Primitives(_sort, _gather, _combine, _gemm)


def mixture_linear(
    x: Tensor,
    gates: Tensor,
    experts: Projection,
    out: Tensor,
    *,
    topk_ids: Tensor,
    dropout: float = 0.0,
    seed: int = 0,
    inplace: bool = False,
) -> Tensor:
    """``out_t + scaling sum_j gates[t, e_j] (dropout(x)_t A_{e_j}^T) B_{e_j}``, with e_j = topk_ids[t, j].

    Shapes, dtypes and errors are those of `grouped_gemms.mixture_linear`, with `out` in bf16; `why_not` says where it
    does not run. One host sync in the forward where grouped_gemm is the cuBLAS build, none in the backward.

    Raises:
        ValueError: also where T*K*max(D, O) reaches 2^31.

    Source:
        MegaBlocks, arXiv 2211.15841; https://github.com/tgale96/grouped_gemm. Called, not copied.
    """
    num_rows, num_features = topk_ids.numel(), max(x.shape[-1], out.shape[-1])
    if num_rows * num_features >= MAX_ELEMENTS:
        raise ValueError(
            f"megablocks computes offsets in int32, too small for {num_rows} routed rows of {num_features} features "
            f"({num_rows * num_features} elements, 2^31 or more); use fewer tokens per step or another kernel"
        )
    # Triton and the extensions launch on the current device, which need not be that of x.
    with torch.cuda.device_of(x):
        return grouped_gemms.mixture_linear(PRIMITIVES, x, gates, experts, out, topk_ids, dropout, seed, inplace)


def why_not(
    device: torch.device, dtype: torch.dtype, experts_shape: tuple[int, int, int, int], shares_A: bool = False
) -> str | None:
    """Why this backend cannot work here, in a sentence, or None.

    The first call for a device runs a small problem there (`grouped_gemms.probe`), which syncs.

    Args:
        device: of the tensors, CUDA.
        dtype: of the frozen linear's output, bfloat16.
        experts_shape: (E, R, D, O); R, D and O must be multiples of 8.
        shares_A: whether the experts share one A.
    """
    reason = grouped_gemms.refusal(dtype, (torch.bfloat16,), experts_shape, shares_A)
    if device.type != "cuda":
        reason = f"runs on cuda, not on {device.type}"
    reason = reason or _missing() or grouped_gemms.probe(mixture_linear, device, dtype)
    if reason is None and experts_shape[0] > MAX_EXPERTS and sizes_stay_on_gpu(device):
        reason = f"takes at most {MAX_EXPERTS} experts with grouped_gemm's CUTLASS build, not {experts_shape[0]}"
    return reason and f"megablocks {reason}"


def _missing() -> str | None:
    """What keeps the packages from being imported: absent, or built for another torch."""
    try:
        from grouped_gemm import backend  # noqa: F401
        from megablocks import ops  # noqa: F401
    except ImportError as error:
        return f"cannot be imported ({type(error).__name__}: {error}); docs/kernels.md says how to install it"
    return None
