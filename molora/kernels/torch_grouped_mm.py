"""Adapter: the sorted mixture of a linear by PyTorch's own grouped GEMM, ``torch.nn.functional.grouped_mm``.

On a GPU of compute capability 9.0 or 10.x this is one CUTLASS kernel per product, with no host sync, so it can be
captured in a CUDA graph. On other GPUs PyTorch loops over the experts and reads the group sizes on the host: right, but
slower, and not for graphs. On a CPU, a loop too. Deterministic everywhere: no atomics, sums in a fixed order.

Legend: T tokens, D input features, O output features, E experts, K top-k, R rank of one expert, N = T*K routed rows.

plan       shape  dtype  meaning
order      (N,)   int64  place among the rows sorted by expert -> flat (t, k) of `topk_ids`
ends       (E,)   int32  where the rows of an expert end; the last is N, because rows past it would never be written
inverse    (N,)   int64  flat (t, k) -> place among the sorted rows
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.kernels import grouped_gemms
from molora.kernels.grouped_gemms import Plan, Primitives
from molora.kernels.reference import Projection


def _sort(topk_ids: Tensor, num_experts: int) -> Plan:
    ids, order = topk_ids.flatten().sort(stable=True)
    # Counts without bincount, which syncs, or histc, which adds with atomics.
    experts = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    return order, ends, inverse


def _gather(tokens: Tensor, plan: Plan, top_k: int) -> Tensor:
    return tokens.index_select(0, plan[0] // top_k)


def _combine(rows: Tensor, plan: Plan, top_k: int) -> Tensor:
    # Not index_add, whose atomics would make the sums depend on the order of arrival.
    return rows.index_select(0, plan[2]).unflatten(0, (-1, top_k)).sum(1)


def _gemm(a: Tensor, b: Tensor, plan: Plan, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    return F.grouped_mm(a.T if trans_a else a, b.transpose(-2, -1) if trans_b else b, offs=plan[1])


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

    Shapes, dtypes and errors are those of `grouped_gemms.mixture_linear`; `why_not` says where it does not run. No host
    sync on a GPU of compute capability 9.0 or 10.x.
    """
    return grouped_gemms.mixture_linear(PRIMITIVES, x, gates, experts, out, topk_ids, dropout, seed, inplace)


def why_not(
    device: torch.device, dtype: torch.dtype, experts_shape: tuple[int, int, int, int], shares_A: bool = False
) -> str | None:
    """Why this backend cannot work here, in a sentence, or None.

    The first call for a device and dtype runs a small problem there (`grouped_gemms.probe`), which syncs.

    Args:
        device: of the tensors, CUDA or CPU.
        dtype: of the frozen linear's output: bfloat16, on a CPU float32 too.
        experts_shape: (E, R, D, O); R, D and O must be multiples of 8.
        shares_A: whether the experts share one A.
    """
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32)
    reason = grouped_gemms.refusal(dtype, dtypes, experts_shape, shares_A)
    if device.type not in ("cuda", "cpu"):
        reason = f"runs on cuda and cpu, not on {device.type}"
    if reason is None:
        reason = grouped_gemms.probe(mixture_linear, device, dtype)
    return reason and f"torch_grouped_mm {reason}"
