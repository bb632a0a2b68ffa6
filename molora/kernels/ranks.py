"""The gates as a mask on the ranks of all experts, with its backward: by Triton where it runs, else by plain PyTorch.

Legend: T tokens, G gates of a token, C ranks in all (E*R), V = C / G consecutive ranks that share a gate. Where experts
share one A, `shrunk` holds only the V ranks that every gate multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora.kernels import launch, reference
from molora.kernels.launch import blocks, power_of_2


def gate_ranks(
    shrunk: Tensor, gates: Tensor | None, num_ranks: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``ranks = scaling * gate * shrunk``, accumulated in fp32 and rounded once.

    Args:
        shrunk: ``x Acat^T``, (T, C), or (T, V) where the experts share A; rows may be strided.
        gates: (T, G) with G dividing C; None: no gates.
        num_ranks: C.
        dtype: of the results.

    Returns:
        ranks (T, C) and `shrunk` in `dtype`, which the backward reads.
    """
    if launch.ready(shrunk.device) and dtype != torch.float64:
        return gate_ranks_triton(shrunk, gates, num_ranks, scaling, dtype)
    shared = shrunk.shape[1] != num_ranks
    return (reference.gate_ranks(shrunk, gates, shared) * scaling).to(dtype), shrunk.to(dtype)


def gate_ranks_backward(
    grad_ranks: Tensor, shrunk: Tensor, gates: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a backward needs of the ranks.

    Args:
        grad_ranks: (T, C), the gradient of `ranks` in the compute dtype.
        shrunk: (T, C) or (T, V), as `gate_ranks` returned it.
        dtype: of the gradient of `shrunk`.

    Returns:
        ranks (T, C) again, the gradient of `shrunk` in its shape, and that of the gates (T, G) or None.
    """
    if launch.ready(shrunk.device) and shrunk.dtype != torch.float64:
        return gate_ranks_backward_triton(grad_ranks, shrunk, gates, scaling, dtype)
    shared = shrunk.shape[1] != grad_ranks.shape[1]
    ranks = (reference.gate_ranks(shrunk, gates, shared) * scaling).to(shrunk.dtype)
    grad = grad_ranks * scaling
    if gates is None:
        return ranks, grad.to(dtype), None
    # d loss / d gate in rank space: R products per gate, and no division by the gate.
    per_gate = grad.unflatten(1, (gates.shape[1], -1)).to(gates.dtype)
    own = shrunk.unflatten(1, (1, -1) if shared else per_gate.shape[1:])
    grad_gates = (per_gate * own).sum(-1)
    gated = per_gate * gates.unsqueeze(-1)
    return ranks, (gated.sum(1) if shared else gated.flatten(1)).to(dtype), grad_gates


def gate_ranks_triton(
    shrunk: Tensor, gates: Tensor | None, num_ranks: int, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`gate_ranks` by Triton; `shrunk` may have one more dimension in front, the parts of a sum."""
    from molora.kernels import ranks_kernels

    parts = shrunk if shrunk.dim() == 3 else shrunk.unsqueeze(0)
    parts = parts if parts.stride(2) == 1 else parts.contiguous()
    (splits, T, width), G = parts.shape, 1 if gates is None else gates.shape[1]
    ranks = torch.empty(T, num_ranks, dtype=dtype, device=shrunk.device)
    keep = shrunk.dtype != dtype or not shrunk.is_contiguous() or shrunk.dim() == 3
    kept = torch.empty(T, width, dtype=dtype, device=shrunk.device) if keep else shrunk
    if T:
        block_c = min(128, power_of_2(num_ranks))
        block_t = 4096 // block_c
        ranks_kernels.gate_fwd_kernel[(blocks(T, block_t), blocks(num_ranks, block_c))](
            parts,
            parts if gates is None else gates.contiguous(),
            ranks,
            kept,
            T,
            parts.stride(1),
            parts.stride(0),
            scaling,
            SPLITS=splits,
            G=G,
            V=num_ranks // G,
            SHARED=width != num_ranks,
            GATED=gates is not None,
            KEEP=keep,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
        )
    return ranks, kept


def gate_ranks_backward_triton(
    grad_ranks: Tensor, shrunk: Tensor, gates: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`gate_ranks_backward` by Triton."""
    from molora.kernels import ranks_kernels

    grad_ranks = grad_ranks.contiguous()
    T, C = grad_ranks.shape
    G = 1 if gates is None else gates.shape[1]
    V = C // G
    ranks, grad_shrunk = torch.empty_like(grad_ranks), torch.empty_like(shrunk, dtype=dtype)
    grad_gates = None if gates is None else torch.empty(T, G, dtype=torch.float32, device=shrunk.device)
    if T:
        block_v = power_of_2(V)
        block_g = min(power_of_2(G), max(1, 256 // block_v))
        block_t = max(1, 4096 // (block_g * block_v))
        ranks_kernels.gate_bwd_kernel[(blocks(T, block_t),)](
            grad_ranks,
            shrunk,
            shrunk if gates is None else gates.contiguous(),
            ranks,
            grad_shrunk,
            ranks if grad_gates is None else grad_gates,
            T,
            scaling,
            G=G,
            V=V,
            SHARED=shrunk.shape[1] != C,
            GATED=gates is not None,
            BLOCK_T=block_t,
            BLOCK_G=block_g,
            BLOCK_V=block_v,
        )
    return ranks, grad_shrunk, grad_gates if gates is None or grad_gates is None else grad_gates.to(gates.dtype)
